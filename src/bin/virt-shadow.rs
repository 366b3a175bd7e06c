//! `virt-shadow`: see [`virt_shadow::cli`].

fn main() -> std::process::ExitCode {
    virt_shadow::cli::main()
}
