//! The manager: a thin driver around `placement` with SQLite, agents' connections and the REST API.
