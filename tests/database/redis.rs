//! Redis, by its own protocol; see redis.io/docs/reference/protocol-spec.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::net::TcpStream;

use super::Site;

pub struct Redis(BufReader<TcpStream>);

impl Redis {
    pub fn socket(&self) -> TcpStream {
        self.0.get_ref().try_clone().unwrap()
    }

    pub fn connect(site: &Site) -> Self {
        let stream = site.connect(6379);
        Self(BufReader::new(stream))
    }

    /// The answer in text; none for a key that is not there.
    pub fn ask(&mut self, command: &str) -> std::io::Result<Option<String>> {
        self.0.get_mut().write_all(format!("{command}\r\n").as_bytes())?;
        let line = self.line()?;
        match line.split_at_checked(1) {
            Some((":" | "+", rest)) => Ok(Some(rest.to_owned())),
            Some(("$", "-1")) => Ok(None),
            Some(("$", len)) => {
                let len: usize = len.parse().map_err(Error::other)?;
                let mut bytes = vec![0; len + 2];
                self.0.read_exact(&mut bytes)?;
                Ok(Some(String::from_utf8_lossy(&bytes[..len]).into_owned()))
            }
            _ => Err(Error::other(line)),
        }
    }

    /// A counter; 0 if it was never there.
    pub fn number(&mut self, command: &str) -> std::io::Result<u64> {
        self.ask(command)?.map_or(Ok(0), |text| text.parse().map_err(Error::other))
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        match line.strip_suffix("\r\n") {
            Some(line) => Ok(line.to_owned()),
            None => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}
