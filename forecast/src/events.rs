//! Scheduled events: known in advance, of a kind, perhaps with a size; their effect is learnt from the last ones.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;

/// Events kept; the oldest are forgotten first.
pub const MOST_EVENTS: usize = 4096;

/// Something known to come: a backup, a release, a match, a holiday.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Event {
    /// Number of the first sample it covers, counted from the series' first.
    pub start: u64,
    /// Samples covered.
    pub length: u32,
    /// Events of one kind have like effects.
    pub kind: u16,
    /// Expected size in any unit (guests, visitors, Mbit/s); effects of a kind are taken in proportion to it. Of a kind
    /// that was never seen, it is taken as the effect itself, in the series' unit.
    pub size: Option<f64>,
}

/// The schedule of one series, sorted by start. Where events overlap the one that starts last counts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Schedule {
    events: Vec<Event>,
}

impl Schedule {
    /// Adds an event; the same event again changes nothing. An event of length 0 is ignored.
    pub fn add(&mut self, event: Event) {
        let event = Event { size: event.size.filter(|s| s.is_finite()), ..event };
        if event.length == 0 || self.events.contains(&event) {
            return;
        }
        let at = self.events.partition_point(|e| e.start <= event.start);
        self.events.insert(at, event);
        if self.events.len() > MOST_EVENTS {
            self.events.remove(0);
        }
    }

    /// Takes an event out of the schedule; false if it was not there.
    pub fn cancel(&mut self, event: &Event) -> bool {
        let before = self.events.len();
        self.events.retain(|e| e != event);
        self.events.len() < before
    }

    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// The event that covers sample number `slot`.
    pub fn at(&self, slot: u64) -> Option<&Event> {
        let end = self.events.partition_point(|e| e.start <= slot);
        // A long event may be covered by few later, shorter ones: a bounded look back.
        self.events[..end].iter().rev().take(16).find(|e| slot - e.start < u64::from(e.length))
    }

    /// Earlier events of `kind` that started before `start`, newest first.
    pub fn earlier(&self, kind: u16, start: u64) -> impl Iterator<Item = &Event> {
        let end = self.events.partition_point(|e| e.start < start);
        self.events[..end].iter().rev().filter(move |e| e.kind == kind)
    }

    pub fn bytes(&self) -> usize {
        size_of::<Event>() * self.events.capacity()
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.count(self.events.len());
        for event in &self.events {
            out.u64(event.start);
            out.u32(event.length);
            out.u32(u32::from(event.kind));
            out.f64(event.size.unwrap_or(f64::NAN));
        }
    }

    pub(crate) fn decode(from: &mut Reader) -> Result<Self, DecodeError> {
        let count = from.count(24, "events")?;
        let mut events: Vec<Event> = Vec::with_capacity(count.min(MOST_EVENTS));
        for _ in 0..count {
            let start = from.u64("start of an event")?;
            let length = from.u32("length of an event")?;
            let kind = u16::try_from(from.u32("kind of an event")?).map_err(|_| from.range("kind of an event"))?;
            let size = Some(from.f64_or_nan("size of an event")?).filter(|s| !s.is_nan());
            if events.len() >= MOST_EVENTS || length == 0 || events.last().is_some_and(|e| e.start > start) {
                return Err(from.range("events"));
            }
            events.push(Event { start, length, kind, size });
        }
        Ok(Self { events })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(start: u64, length: u32, kind: u16) -> Event {
        Event { start, length, kind, size: None }
    }

    #[test]
    fn the_later_of_two_overlapping_events_counts() {
        let mut schedule = Schedule::default();
        schedule.add(event(20, 5, 2));
        schedule.add(event(10, 30, 1));
        let kinds: Vec<Option<u16>> = [9, 10, 20, 24, 25, 40].map(|s| schedule.at(s).map(|e| e.kind)).into();
        assert_eq!(kinds, [None, Some(1), Some(2), Some(2), Some(1), None]);
    }

    #[test]
    fn the_schedule_is_bounded_and_forgets_the_oldest() {
        let mut schedule = Schedule::default();
        for i in 0..MOST_EVENTS as u64 + 10 {
            schedule.add(event(i * 10, 5, 1));
        }
        assert!(schedule.at(50).is_none());
        assert!(schedule.at(100).is_some());
    }
}
