//! QEMU's list of RAM blocks: the whole memory of a guest, ROMs and video memory included.
//!
//! ```text
//!               Block Name    PSize              Offset               Used              Total                HVA  RO
//!                   pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f5a2be00000  rw
//! ```
//! The last two columns came with QEMU 8; without addresses the memory cannot be found, which is said so.

/// More blocks than any guest has; a list beyond it is not one.
pub const MAX_BLOCKS: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name of it, unique in a guest and equal on all its copies, such as `pc.ram`.
    pub name: String,
    /// Size of the pages that back it, bytes.
    pub page_size: u64,
    /// Bytes in use; this much belongs to the guest's state.
    pub used: u64,
    /// Bytes reserved.
    pub total: u64,
    /// Address in QEMU's process.
    pub hva: u64,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RamblockError {
    #[error("`info ramblock` of this QEMU shows no addresses (QEMU older than 8); use QEMU 8 or newer")]
    NoAddresses,
    #[error("`info ramblock` line cannot be understood: {line:?}")]
    Line { line: String },
    #[error("`info ramblock` lists no memory at all")]
    Empty,
    #[error("`info ramblock` lists {name} twice")]
    Twice { name: String },
    #[error("`info ramblock` lists more than {MAX_BLOCKS} blocks")]
    TooMany,
}

/// Parses the answer of `info ramblock`. Blocks keep QEMU's order.
pub fn parse(text: &str) -> Result<Vec<RamBlock>, RamblockError> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let header = lines.next().ok_or(RamblockError::Empty)?;
    if !header.starts_with("Block Name") {
        return Err(RamblockError::Line { line: header.to_owned() });
    }
    if !header.contains("HVA") {
        return Err(RamblockError::NoAddresses);
    }
    let mut blocks: Vec<RamBlock> = Vec::new();
    for line in lines {
        let block = parse_line(line).ok_or_else(|| RamblockError::Line { line: line.to_owned() })?;
        if blocks.iter().any(|other| other.name == block.name) {
            return Err(RamblockError::Twice { name: block.name });
        }
        if blocks.len() == MAX_BLOCKS {
            return Err(RamblockError::TooMany);
        }
        blocks.push(block);
    }
    if blocks.is_empty() { Err(RamblockError::Empty) } else { Ok(blocks) }
}

/// Columns are taken from the right, because a name may hold anything.
fn parse_line(line: &str) -> Option<RamBlock> {
    let mut rest = line;
    let mut column = || {
        let trimmed = rest.trim_ascii_end();
        let start = trimmed.rfind(|c: char| c.is_ascii_whitespace())? + 1;
        rest = &trimmed[..start];
        Some(&trimmed[start..])
    };
    let read_only = match column()? {
        "ro" => true,
        "rw" => false,
        _ => return None,
    };
    let hva = hex(column()?)?;
    let total = hex(column()?)?;
    let used = hex(column()?)?;
    let _offset = hex(column()?)?;
    let unit = match column()? {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    let page_size = column()?.parse::<u64>().ok()?.checked_mul(unit)?;
    let name = rest.trim();
    // Addresses end far below 2^63 on every machine; a sum that overflows is a broken line.
    let sane = !name.is_empty() && page_size.is_power_of_two() && used <= total && hva.checked_add(total).is_some();
    sane.then(|| RamBlock { name: name.to_owned(), page_size, used, total, hva, read_only })
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = include_str!("../../fixtures/ramblock/qemu-10.0.2-q35.txt");

    #[test]
    fn a_real_list_is_understood() {
        let blocks = parse(LIST).unwrap();
        let ram = &blocks[0];
        assert_eq!((ram.name.as_str(), ram.used, ram.page_size, ram.read_only), ("pc.ram", 256 << 20, 4096, false));
        assert!(ram.hva > 0x7000_0000_0000);
        let tables = blocks.iter().find(|block| block.name == "/rom@etc/acpi/tables").unwrap();
        assert!(tables.used < tables.total);
        assert!(blocks.iter().any(|block| block.read_only));
    }

    #[test]
    fn huge_pages_and_names_with_blanks_are_understood() {
        let header = "   Block Name    PSize   Offset  Used  Total  HVA  RO\r\n";
        let text = format!("{header}  my ram  2 MiB  0x0 0x200000 0x400000 0x7f0000000000  rw\r\n");
        let blocks = parse(&text).unwrap();
        assert_eq!((blocks[0].name.as_str(), blocks[0].page_size, blocks[0].used), ("my ram", 2 << 20, 2 << 20));
    }

    #[test]
    fn lists_that_cannot_be_trusted_are_refused() {
        let header = "Block Name PSize Offset Used Total HVA RO";
        let line = |line: &str| parse(&format!("{header}\n{line}\n"));
        assert_eq!(parse(""), Err(RamblockError::Empty));
        assert_eq!(parse(header), Err(RamblockError::Empty));
        assert_eq!(parse("Block Name PSize Offset Used Total\n"), Err(RamblockError::NoAddresses));
        for broken in [
            "pc.ram 4 KiB 0x0 0x10 0x10 0x7f00 xx",
            "pc.ram 4 KiB 0x0 0x20 0x10 0x7f00 rw",
            "pc.ram 3 KiB 0x0 0x10 0x10 0x7f00 rw",
            "pc.ram 4 KiB 0x0 0x10 0x10 0xffffffffffffffff rw",
            "4 KiB 0x0 0x10 0x10 0x7f00 rw",
            "unknown command: 'info ramblock'",
        ] {
            assert!(matches!(line(broken), Err(RamblockError::Line { .. })), "{broken}");
        }
        let twice = "a 4 KiB 0x0 0x10 0x10 0x7f00 rw\na 4 KiB 0x0 0x10 0x10 0x7f00 rw";
        assert_eq!(line(twice), Err(RamblockError::Twice { name: "a".into() }));
    }
}
