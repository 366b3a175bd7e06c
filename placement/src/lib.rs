//! Decides; see DESIGN.
