//! Messages that pass through memory as whole parcels: what a rank has posted, and the letters that have come for it.
//!
//! Owns the tickets of such transports. How a letter comes, and how one learns that no more will, is the transport's.

use std::sync::{Arc, Mutex};

use super::exchange::lock;
use super::transport::{Parcel, Tag, Ticket, TransportError};

/// A message that has arrived.
pub(super) struct Letter {
    pub(super) from: usize,
    /// [`Tag::value`].
    pub(super) tag: u32,
    pub(super) parcel: Arc<Parcel>,
}

/// What a rank has posted, by ticket; none where a ticket is free.
#[derive(Default)]
pub(super) struct Posts(Vec<Option<Posted>>);

enum Posted {
    /// It is as good as carried: the parcel is shared with who carries it.
    Send(Arc<Parcel>),
    Receive {
        from: usize,
        tag: Tag,
    },
}

impl Posts {
    /// A message that was handed over.
    pub(super) fn sent(&mut self, parcel: Arc<Parcel>) -> Ticket {
        self.post(Posted::Send(parcel))
    }

    /// A message that is waited for.
    pub(super) fn awaited(&mut self, from: usize, tag: Tag) -> Ticket {
        self.post(Posted::Receive { from, tag })
    }

    fn post(&mut self, posted: Posted) -> Ticket {
        let free = self.0.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.0.push(None);
            self.0.len() - 1
        });
        self.0[index] = Some(posted);
        Ticket(index)
    }

    /// As [`super::transport::Transport::poll`]. `letters` are those that have come; `end` says why no more come from a rank, if that is so:
    /// a rank's letters must be there before its end is.
    pub(super) fn poll(
        &mut self,
        ticket: Ticket,
        letters: &Mutex<Vec<Letter>>,
        end: impl FnOnce(usize) -> Option<String>,
    ) -> Result<Option<Arc<Parcel>>, TransportError> {
        let (from, tag) = match self.0[ticket.0].take() {
            None => return Err(TransportError::Lost("the message was given up".into())),
            Some(Posted::Send(parcel)) => return Ok(Some(parcel)),
            Some(Posted::Receive { from, tag }) => (from, tag),
        };
        // Read before the letters, so that none is missed.
        let end = end(from);
        let mut letters = lock(letters);
        if let Some(index) = letters.iter().position(|letter| letter.from == from && letter.tag == tag.value()) {
            return Ok(Some(letters.remove(index).parcel));
        }
        if let Some(reason) = end {
            return Err(TransportError::Lost(reason));
        }
        self.0[ticket.0] = Some(Posted::Receive { from, tag });
        Ok(None)
    }

    /// Gives up on a message.
    pub(super) fn abandon(&mut self, ticket: Ticket) {
        self.0[ticket.0] = None;
    }
}
