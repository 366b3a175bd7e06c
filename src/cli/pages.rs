//! Completion scripts and man pages, generated from the definitions of the commands.

use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::aot;

use super::args::{Cli, Daemon, Shell};

/// A completion script for `shell`.
pub(super) fn completion(shell: Shell) -> String {
    let generator = match shell {
        Shell::Bash => aot::Shell::Bash,
        Shell::Zsh => aot::Shell::Zsh,
        Shell::Fish => aot::Shell::Fish,
    };
    // Its generator for bash muddles subcommands if the program's name has a dash: it gets one without, for functions.
    let name = if shell == Shell::Bash { "virtshadow" } else { "virt-shadow" };
    let mut script = Vec::new();
    aot::generate(generator, &mut shown(Cli::command(), name), name, &mut script);
    let mut script = String::from_utf8_lossy(&script).into_owned();
    if shell == Shell::Bash {
        script = script.replace("-o default virtshadow\n", "-o default virt-shadow\n");
        script.push_str(BASH_NAMES);
    }
    script
}

/// `command` without its hidden subcommands, which clap's generators would offer.
fn shown(command: clap::Command, name: &'static str) -> clap::Command {
    let kept = command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned().collect::<Vec<_>>();
    let bare = clap::Command::new(name);
    let bare = command.get_arguments().cloned().fold(bare, clap::Command::arg);
    let about = command.get_about().cloned().unwrap_or_default();
    bare.about(about).version(env!("CARGO_PKG_VERSION")).subcommands(kept)
}

/// Adds names of domains and hosts, asked for when they are needed, to what clap generates.
const BASH_NAMES: &str = r#"
_virtshadow_with_names() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" command="" names="" word
    case "$previous" in
        --to|--on)
            COMPREPLY=( $(compgen -W "$(virt-shadow -q hosts --name 2>/dev/null)" -- "$current") )
            return 0
            ;;
    esac
    _virtshadow "$@"
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$word" in
            enable|disable|info|watch|promote|switchover|verify|policy|plan) command="$word"; break ;;
        esac
    done
    if [[ -n "$command" && "$current" != -* && "$previous" != --* ]]; then
        case "$command" in
            enable|policy|plan) names="$(virsh -q list --name 2>/dev/null)" ;;
            *) names="$(virt-shadow -q list --name 2>/dev/null)" ;;
        esac
        COMPREPLY+=( $(compgen -W "$names" -- "$current") )
    fi
    return 0
}
complete -F _virtshadow_with_names -o bashdefault -o default virt-shadow
"#;

/// `virt-shadow.1`, one page per command, and `virtshadowd.8`.
pub(super) fn man(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut tool = Cli::command();
    tool.build();
    page(directory, "virt-shadow", "virt-shadow", "1", tool.clone())?;
    for command in tool.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help") {
        let name = format!("virt-shadow-{}", command.get_name());
        page(directory, &name, &name.replacen("virt-shadow-", "virt-shadow ", 1), "1", command.clone())?;
    }
    page(directory, "virtshadowd", "virtshadowd", "8", Daemon::command())
}

/// `usage`: how the command is called.
fn page(directory: &Path, name: &str, usage: &str, section: &str, command: clap::Command) -> io::Result<()> {
    // clap keeps names for ever; there are a dozen of these in a run.
    let leaked: &'static str = Box::leak(name.to_owned().into_boxed_str());
    let command = command.name(leaked).display_name(leaked).bin_name(usage);
    let mut text = Vec::new();
    clap_mangen::Man::new(command).section(section).manual("virt-shadow").render(&mut text)?;
    std::fs::write(directory.join(format!("{name}.{section}")), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_knows_commands_and_asks_for_names() {
        let script = completion(Shell::Bash);
        for word in ["switchover", "--interval", "--force", "virt-shadow -q list --name", "_virtshadow_with_names"] {
            assert!(script.contains(word), "{word}");
        }
        assert!(!script.contains(" hook "), "hidden commands are not offered");
        assert!(completion(Shell::Fish).contains("virt-shadow"));
    }

    /// What bash makes of a line, with the programs that are asked for names played.
    fn completed(line: &str) -> String {
        let script = completion(Shell::Bash);
        let words = line.split(' ').collect::<Vec<_>>();
        let (last, previous) = (words.len() - 1, words[words.len() - 2]);
        let ask = format!(
            "{script}\nvirsh() {{ echo web db; }}\nvirt-shadow() {{ [[ $2 = hosts ]] && echo host1 host2 || echo web; }}\n\
             COMP_WORDS=({line}); COMP_CWORD={last}\n\
             _virtshadow_with_names virt-shadow '{}' '{previous}'; echo \"${{COMPREPLY[@]}}\"",
            words[last]
        );
        let output = std::process::Command::new("bash").arg("-c").arg(ask).output().unwrap();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    #[test]
    fn bash_completes_commands_options_and_names() {
        for (line, expected) in [
            ("virt-shadow switch", "switchover"),
            ("virt-shadow enable --sh", "--shadows"),
            ("virt-shadow enable d", "db"),
            ("virt-shadow info w", "web"),
            ("virt-shadow enable web --on h", "host1 host2"),
            ("virt-shadow switchover web --to host2", "host2"),
            ("virt-shadow --format j", "json"),
        ] {
            assert_eq!(completed(line), expected, "{line}");
        }
    }

    #[test]
    fn every_command_has_a_page() {
        let directory = std::env::temp_dir().join(format!("virt-shadow-man-{}", std::process::id()));
        man(&directory).unwrap();
        let enable = std::fs::read_to_string(directory.join("virt-shadow-enable.1")).unwrap();
        assert!(enable.contains("\\fBvirt\\-shadow enable\\fR"), "{enable}");
        assert!(enable.contains("Protect a running domain") && enable.contains("\\-\\-interval"), "{enable}");
        assert!(directory.join("virtshadowd.8").exists() && directory.join("virt-shadow.1").exists());
        assert!(!directory.join("virt-shadow-hook.1").exists());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
