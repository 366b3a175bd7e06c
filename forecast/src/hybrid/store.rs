//! Saving and loading. Samples and what was learnt are two envelopes, so that samples of years outlive models of months:
//! where the model part is of another format, the samples load and learning is due.

use super::Hybrid;
use super::experts::Experts;
use super::tracking::Tracking;
use crate::codec::{Format, Reader, Writer};
use crate::error::DecodeError;
use crate::history::History;

const OUTER: Format = Format { what: "forecaster", magic: *b"VSFC", oldest: 1, newest: 1 };
const SAMPLES: Format = Format { what: "history", magic: *b"VSFH", oldest: 1, newest: 1 };
const MODELS: Format = Format { what: "models", magic: *b"VSFM", oldest: 2, newest: 2 };

/// A loaded forecaster.
#[derive(Debug)]
pub struct Loaded {
    pub hybrid: Hybrid,
    /// Why the models were left out, if they were: they are learnt anew from the samples.
    pub left_out: Option<DecodeError>,
}

impl Hybrid {
    /// Everything but learning under way.
    pub fn save(&self) -> Vec<u8> {
        let mut samples = Writer::new();
        self.history.encode(&mut samples);
        let mut models = Writer::new();
        models.u8(u8::from(self.experts.is_some()));
        if let Some(experts) = &self.experts {
            experts.encode(&mut models);
            self.tracking.encode(&mut models);
            models.u64(self.fits);
            models.u64(self.due);
            models.u64(self.changes_seen);
        }
        let mut out = Writer::new();
        out.blob(&samples.seal(SAMPLES));
        out.blob(&models.seal(MODELS));
        out.seal(OUTER)
    }

    /// Reads what [`Hybrid::save`] wrote. Models of another format are left out and learnt anew; anything else that is
    /// wrong is refused.
    pub fn load(bytes: &[u8]) -> Result<Loaded, DecodeError> {
        let mut outer = Reader::open(bytes, OUTER)?;
        let mut samples = Reader::open(outer.blob("history")?, SAMPLES)?;
        let history = History::decode(&mut samples)?;
        samples.end()?;
        let models = outer.blob("models")?;
        outer.end()?;
        let mut hybrid = Self::new(*history.shape());
        hybrid.history = history;
        let left_out = match hybrid.load_models(models) {
            Ok(()) => None,
            Err(refusal @ DecodeError::Format { .. }) => Some(refusal),
            Err(other) => return Err(other),
        };
        Ok(Loaded { hybrid, left_out })
    }

    fn load_models(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        let mut from = Reader::open(bytes, MODELS)?;
        if from.u8("whether models follow")? != 0 {
            let horizon = self.history.shape().horizon;
            let experts = Experts::decode(horizon, self.history.shape().season, &mut from)?;
            let tracking = Tracking::decode(horizon, &mut from)?;
            (self.fits, self.due) = (from.u64("fits")?, from.u64("due")?);
            self.changes_seen = from.u64("changes")?;
            (self.experts, self.tracking) = (Some(experts), tracking);
        }
        from.end()
    }
}
