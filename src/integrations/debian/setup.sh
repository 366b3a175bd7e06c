#!/bin/sh
# Installs what virt-shadow needs to build and to run its lab on Debian 12: the compiler's C libraries from
# Debian 12 itself, QEMU and libvirt from its backports suite. Run as root; a second run does nothing.
#
# The backports suite is added as a copy of the machine's own Debian source with another suite name, so that the
# machine keeps using the mirror that its owner chose.
set -eu

BUILD_PACKAGES="gcc make pkg-config libvirt-dev libsqlite3-dev libzstd-dev git"
HOST_PACKAGES="qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu
  libvirt-daemon-driver-network nftables iproute2 util-linux busybox-static cpio socat xz-utils zstd
  e2fsprogs"
MARKER=/var/lib/virt-shadow-setup/packages
BACKPORTS=/etc/apt/sources.list.d/virt-shadow-backports.sources

# Debian 12's own Rust is too old; the one it keeps for its browsers is not. A toolchain that is there is left alone.
OLDEST_RUST=1.89
rust_is_new_enough() {
  found=$(cargo --version 2>/dev/null | cut -d' ' -f2) && [ -n "$found" ] &&
    [ "$(printf '%s\n%s\n' "$OLDEST_RUST" "$found" | sort -V | head -n 1)" = "$OLDEST_RUST" ]
}
if ! rust_is_new_enough; then BUILD_PACKAGES="$BUILD_PACKAGES rustc-web cargo-web rustfmt-web"; fi

wanted=$(echo $BUILD_PACKAGES $HOST_PACKAGES)

die() { echo "setup: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "packages can only be installed by root; run it again as root"
if [ -f "$MARKER" ] && [ "$(cat "$MARKER")" = "$wanted" ] && command -v virsh >/dev/null; then exit 0; fi

. /etc/os-release
[ "${ID:-}" = debian ] || die "this script knows Debian only (here: ${PRETTY_NAME:-unknown}); install by hand: $wanted"

# The first Debian source of this machine that serves the release itself: its URI and its key.
own_source() {
  for file in /etc/apt/sources.list.d/*.sources; do
    [ -f "$file" ] || continue
    awk -v suite="$VERSION_CODENAME" '
      /^URIs:/ { uri = $2 } /^Suites:/ { suites = " " $0 " " } /^Signed-By:/ { key = $2 }
      /^$/ { check() } END { check() }
      function check() { if (!done && uri && suites ~ (" " suite " ")) { print uri, key; done = 1 } uri = suites = key = "" }
    ' "$file"
  done
  [ -f /etc/apt/sources.list ] && awk -v suite="$VERSION_CODENAME" '
    $1 == "deb" { i = 2; key = ""; if ($2 ~ /^\[/) { key = $2; gsub(/.*signed-by=|\].*/, "", key); i = 3 }
      if ($(i + 1) == suite) { print $i, key; exit } }' /etc/apt/sources.list
  return 0
}

if [ "$VERSION_CODENAME" = bookworm ] && ! grep -rqs 'bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d; then
  set -- $(own_source | head -n 1)
  [ $# -ge 1 ] || die "no Debian source for $VERSION_CODENAME found under /etc/apt; add bookworm-backports by hand"
  { echo "Types: deb"; echo "URIs: $1"; echo "Suites: bookworm-backports"; echo "Components: main"
    echo "Signed-By: ${2:-/usr/share/keyrings/debian-archive-keyring.gpg}"; } >"$BACKPORTS"
fi

export DEBIAN_FRONTEND=noninteractive
echo "setup: installing packages (about a minute)"
apt-get update -q >/dev/null || echo "setup: some package lists could not be refreshed; going on with those at hand" >&2
release=""
[ "$VERSION_CODENAME" = bookworm ] && release="-t bookworm-backports"
# Services must not start here: the lab starts its own libvirtd for each host, and a build machine needs none.
policy=/usr/sbin/policy-rc.d
made_policy=""
if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; made_policy=1; fi
trap '[ -z "$made_policy" ] || rm -f "$policy"' EXIT
# Debian 12's own header packages serve the build; QEMU and libvirt come from backports together with their headers.
log=$(mktemp)
if ! apt-get install -qy --no-install-recommends $release $wanted >"$log" 2>&1; then
  tail -n 20 "$log" >&2; die "apt-get install failed (whole log: $log)"
fi
rm -f "$log"
mkdir -p "$(dirname "$MARKER")"
echo "$wanted" >"$MARKER"
rust_is_new_enough || die "no Rust of at least $OLDEST_RUST is to be had from this machine's package sources; install it"
echo "setup: done: $(qemu-system-x86_64 --version | head -n 1), libvirt $(virsh --version)"
