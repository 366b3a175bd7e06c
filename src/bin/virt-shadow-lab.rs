//! `virt-shadow-lab`: see [`virt_shadow::lab`].

fn main() -> std::process::ExitCode {
    virt_shadow::lab::cli::main()
}
