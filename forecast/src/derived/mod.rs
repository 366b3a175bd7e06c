//! What is made of forecasts: congestion to come, counts of instances, several variables together.

pub mod congestion;
pub mod counts;
pub mod joint;
