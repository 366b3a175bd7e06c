//! PostgreSQL, by its own protocol: simple queries of a user who needs no password.

use std::io::{BufReader, Error, Read, Write};
use std::net::TcpStream;

use super::Site;

const PROTOCOL: u32 = 196_608;

pub struct Postgres(BufReader<TcpStream>);

impl Postgres {
    pub fn socket(&self) -> TcpStream {
        self.0.get_ref().try_clone().unwrap()
    }

    pub fn connect(site: &Site) -> Self {
        let stream = site.connect(5432);
        let mut connection = Self(BufReader::new(stream));
        let parameters = b"user\0postgres\0database\0bench\0\0";
        let length = 8 + parameters.len() as u32;
        let hello = [&length.to_be_bytes()[..], &PROTOCOL.to_be_bytes(), parameters].concat();
        connection.0.get_mut().write_all(&hello).unwrap();
        connection.until_ready().unwrap();
        connection
    }

    /// Rows of a query, fields as text. What changes something is committed when this returns.
    pub fn ask(&mut self, query: &str) -> std::io::Result<Vec<Vec<String>>> {
        let length = 4 + query.len() as u32 + 1;
        let message = [b"Q", &length.to_be_bytes()[..], query.as_bytes(), b"\0"].concat();
        self.0.get_mut().write_all(&message)?;
        self.until_ready()
    }

    fn until_ready(&mut self) -> std::io::Result<Vec<Vec<String>>> {
        let (mut rows, mut failure) = (Vec::new(), None);
        loop {
            let mut head = [0; 5];
            self.0.read_exact(&mut head)?;
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let mut body = vec![0; length.saturating_sub(4)];
            self.0.read_exact(&mut body)?;
            match head[0] {
                b'D' => rows.push(fields(&body)),
                b'E' => failure = Some(String::from_utf8_lossy(&body).replace('\0', " ")),
                b'Z' => return failure.map_or(Ok(rows), |text| Err(Error::other(text))),
                _ => {}
            }
        }
    }
}

/// be16 number of fields, each be32 length (-1: none) and text.
fn fields(body: &[u8]) -> Vec<String> {
    let (mut found, mut at) = (Vec::new(), 2);
    while let Some(length) = body.get(at..at + 4) {
        let length = i32::from_be_bytes([length[0], length[1], length[2], length[3]]).max(0) as usize;
        found.push(String::from_utf8_lossy(&body[at + 4..at + 4 + length]).into_owned());
        at += 4 + length;
    }
    found
}
