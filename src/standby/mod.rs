//! The shadow's side: waiting domain, memory image, journal, promotion.
