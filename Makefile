# Everything a newcomer needs: `make demo` and `make test` install what is missing (Debian 12, root) and build.
CARGO ?= cargo
PROFILE ?= release
TARGET := $(if $(filter release,$(PROFILE)),release,debug)
CARGO_PROFILE := $(if $(filter release,$(PROFILE)),--release,)
BIN := target/$(TARGET)

.PHONY: help setup build demo test test-databases simulate lint bench docs install clean

help:
	@echo "make demo             set up, build, and lose a host under a running guest"
	@echo "make test             set up, lint, format check and all tests"
	@echo "make test-databases [ROUNDS=n]  power cuts under Redis and PostgreSQL, n in each mode (20)"
	@echo "make simulate SEEDS=n  the sync protocol in virtual time with faults, n seeds (10,000)"
	@echo "make bench [BENCH=x]  benchmarks, beside a peer or a limit (FORMAT=json for programs)"
	@echo "make docs             man pages and completions into target/docs"
	@echo "make install          into DESTDIR and PREFIX (default /usr)"

setup:
	@src/integrations/debian/setup.sh

build: setup
	@echo "build: $(TARGET) (a few minutes the first time)"
	@$(CARGO) build --locked $(CARGO_PROFILE) --bins

demo: build
	@$(BIN)/virt-shadow-lab demo $(if $(FORMAT),--format $(FORMAT))

lint: setup
	@$(CARGO) fmt --all --check
	@if $(CARGO) clippy --version >/dev/null 2>&1; \
	then $(CARGO) clippy --locked --workspace --all-targets -- -D warnings; \
	else echo "lint: no clippy here (Debian has none for this Rust); only the formatting was checked"; fi

# In the development profile, which optimises the crates that move pages and builds the rest in a third of the time.
# The tests with real hosts share two cores: two at a time.
test: lint
	@$(CARGO) build --locked --bins
	@$(CARGO) test --locked --workspace --no-fail-fast -- --test-threads=$(or $(TEST_THREADS),2)

# The same as in `make test`, which cuts the power once in each mode.
test-databases: setup
	@$(CARGO) build --locked --bins
	@ROUNDS=$(or $(ROUNDS),20) $(CARGO) test --locked --test databases -- --nocapture --test-threads=1

# The same simulation as in `make test`, which runs a few hundred seeds. A seed that fails is printed.
SEEDS ?= 10000
simulate: setup
	@VMSYNC_SEEDS=$(SEEDS) $(CARGO) test --locked --release -p vmsync --test simulation -- --nocapture

# BENCH=forecast and BENCH=placement need no lab. DATA=DIR adds the series of DIR/manifest.json (or MANIFEST) to the forecasts,
# LINKS=file/column,... alarms.
bench: $(if $(filter forecast placement,$(BENCH)),setup,build)
ifeq ($(filter forecast placement,$(BENCH)),)
	@$(BIN)/virt-shadow-lab bench $(BENCH) $(if $(FORMAT),--format $(FORMAT))
endif
ifneq ($(filter placement,$(or $(BENCH),placement)),)
	@$(CARGO) run --quiet --locked --release -p placement --example bench -- $(if $(FORMAT),--format $(FORMAT))
endif
ifneq ($(filter forecast,$(or $(BENCH),forecast)),)
	@$(CARGO) run --quiet --locked --release -p forecast --example bench -- $(if $(FORMAT),--format $(FORMAT)) \
		$(if $(DATA),--data $(DATA)) $(if $(MANIFEST),--manifest $(MANIFEST)) $(if $(LINKS),--links $(LINKS))
endif

docs: build
	@mkdir -p target/docs/man target/docs/completions
	@$(BIN)/virt-shadow man target/docs/man
	@$(BIN)/virt-shadow completion bash > target/docs/completions/virt-shadow
	@echo "docs: target/docs"

PREFIX ?= /usr
install: build docs
	install -Dm755 -t $(DESTDIR)$(PREFIX)/bin $(BIN)/virt-shadow $(BIN)/virt-shadow-lab
	install -Dm755 -t $(DESTDIR)$(PREFIX)/sbin $(BIN)/virtshadowd
	install -Dm644 -t $(DESTDIR)$(PREFIX)/share/man/man1 target/docs/man/*.1
	install -Dm644 -t $(DESTDIR)$(PREFIX)/share/man/man8 target/docs/man/*.8
	install -Dm644 -t $(DESTDIR)$(PREFIX)/share/bash-completion/completions target/docs/completions/virt-shadow
	install -Dm755 src/integrations/libvirt/virt-shadow-hook $(DESTDIR)/etc/libvirt/hooks/qemu.d/virt-shadow
	sed 's|^ExecStart=/usr/|ExecStart=$(PREFIX)/|' src/integrations/systemd/virtshadowd.service | \
	install -Dm644 /dev/stdin $(DESTDIR)/lib/systemd/system/virtshadowd.service

clean:
	@$(CARGO) clean
