//! Percent-encoding of path segments and query values: names of domains may hold any character.

/// `text` with everything but unreserved characters encoded.
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// None if an escape is broken or the result is not UTF-8.
pub fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = tail;
            continue;
        }
        let digit = |at: usize| char::from(*tail.get(at)?).to_digit(16);
        bytes.push((digit(0)? * 16 + digit(1)?) as u8);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).ok()
}

/// The values of `names`, in their order, from a query string. `Err`: a key that is not among them, or that is broken.
pub fn query<const N: usize>(query: Option<&str>, names: [&str; N]) -> Result<[Option<String>; N], String> {
    let mut values = [const { None }; N];
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let at = names.iter().position(|name| *name == key).ok_or_else(|| key.to_owned())?;
        values[at] = Some(decode(&value.replace('+', " ")).ok_or_else(|| key.to_owned())?);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_survives() {
        for name in ["web-1", "a b/c?d&e=f%20+", "größe", ""] {
            assert_eq!(decode(&encode(name)).as_deref(), Some(name));
        }
        assert_eq!(encode("a/b c"), "a%2Fb%20c");
        for broken in ["%", "%4", "%zz", "%ff", "%é"] {
            assert_eq!(decode(broken), None, "{broken}");
        }
    }

    #[test]
    fn unknown_keys_are_named() {
        assert_eq!(query(Some("b=2&a=x%20y+z"), ["a", "b"]).unwrap(), [Some("x y z".into()), Some("2".into())]);
        assert_eq!(query(None, ["a"]).unwrap(), [None]);
        assert_eq!(query(Some("sinse=1"), ["since"]).unwrap_err(), "sinse");
    }
}
