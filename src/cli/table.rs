//! Tables and figures as virsh prints them.

/// Columns with a heading, and rows of text.
///
/// ```text
///  Domain   State       Primary
/// -------------------------------
///  web      protected   host1
/// ```
#[derive(Debug, Clone)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), rows: Vec::new() }
    }

    /// Cells beyond the headings are dropped, missing ones are empty.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The lines; without heading and rule if `quiet`.
    pub fn render(&self, quiet: bool) -> String {
        let cell = |row: &[String], column: usize| row.get(column).map_or(String::new(), |text| plain(text));
        let widths: Vec<usize> = (0..self.headings.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| width(&cell(row, column)));
                cells.chain([width(self.headings[column])]).max().unwrap_or(0)
            })
            .collect();
        let line = |cells: Vec<String>| {
            let padded: Vec<_> =
                cells.iter().zip(&widths).map(|(text, to)| format!("{text}{}", " ".repeat(to - width(text)))).collect();
            format!(" {}\n", padded.join("   ").trim_end())
        };
        let mut text = String::new();
        if !quiet {
            text.push_str(&line(self.headings.iter().map(|heading| (*heading).to_owned()).collect()));
            let rule = widths.iter().sum::<usize>() + 3 * widths.len().saturating_sub(1) + 2;
            text.push_str(&"-".repeat(rule));
            text.push('\n');
        }
        for row in &self.rows {
            text.push_str(&line((0..self.headings.len()).map(|column| cell(row, column)).collect()));
        }
        text
    }
}

/// Columns a text takes in a terminal, near enough: one per character.
fn width(text: &str) -> usize {
    text.chars().count()
}

/// `text` on one line and without control characters: it may come from anywhere.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `Name:           value` lines, as `virsh dominfo` prints them.
pub fn fields(fields: &[(&str, String)]) -> String {
    let widest = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    fields.iter().map(|(name, value)| format!("{:<widest$} {}\n", format!("{name}:"), plain(value))).collect()
}

/// Bytes with the unit that leaves one to three digits before the point.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Microseconds, as milliseconds.
pub fn ms(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1e3)
}

/// A point in time, milliseconds since 1970, in UTC as `virsh event --timestamp` prints it.
pub fn timestamp(time_ms: u64) -> String {
    let (days, ms_of_day) = (time_ms / 86_400_000, time_ms % 86_400_000);
    // Years that begin in March, counted from 0000-03-01: leap days come last, so months have fixed lengths.
    let day = days + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hours, minutes) = (ms_of_day / 3_600_000, ms_of_day / 60_000 % 60);
    let (seconds, ms) = (ms_of_day / 1_000 % 60, ms_of_day % 1_000);
    format!("{year:04}-{month:02}-{day_of_month:02} {hours:02}:{minutes:02}:{seconds:02}.{ms:03}+0000")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_look_like_those_of_virsh() {
        let mut table = Table::new(&["Domain", "State", "Primary"]);
        table.row(["web".into(), "protected".into(), "host1".into()]);
        table.row(["größe".into(), "evil\x1b[2J\nrow".into(), String::new()]);
        let expected = " Domain   State          Primary
---------------------------------
 web      protected      host1
 größe    evil [2J row
";
        assert_eq!(table.render(false), expected);
        assert_eq!(table.render(true), expected.split_once("-\n").unwrap().1);
        assert_eq!(Table::new(&["A"]).render(true), "");
    }

    #[test]
    fn figures_are_short() {
        for (value, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KiB"),
            (1 << 20, "1.0 MiB"),
            (5_000_000_000, "4.7 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        assert_eq!(ms(1250), "1.2 ms");
        assert_eq!(fields(&[("Name", "web".into()), ("State", "up".into())]), "Name:  web\nState: up\n");
    }

    #[test]
    fn timestamps_are_right_around_leap_days_and_ends_of_years() {
        for (time_ms, text) in [
            (0, "1970-01-01 00:00:00.000+0000"),
            (951_782_399_999, "2000-02-28 23:59:59.999+0000"),
            (951_782_400_000, "2000-02-29 00:00:00.000+0000"),
            (1_735_689_599_001, "2024-12-31 23:59:59.001+0000"),
            (4_107_542_400_000, "2100-03-01 00:00:00.000+0000"),
        ] {
            assert_eq!(timestamp(time_ms), text);
        }
    }
}
