//! Documents, prompts and parts of streams.

use proptest::prelude::*;

use super::*;

fn segment(ids: Range<u8>, documents: &[(u64, u64)]) -> Segment {
    let mut list = DocumentList::default();
    documents.iter().for_each(|&(end, prompt)| list.push(end, prompt));
    Segment { tokens: Tokens::U8(ids.collect()), documents: list.finish() }
}

#[test]
fn prompts_are_no_targets_and_documents_know_their_start() {
    let stream = Stream::new([
        segment(0..10, &[(4, 0), (9, 3), (10, 1)]),
        segment(0..0, &[]),
        segment(10..20, &[]),
        segment(20..26, &[(6, 2)]),
    ]);
    let mut targets = [0; 26];
    stream.copy_targets_to(0, &mut targets);
    let learned: Vec<i32> = targets.into_iter().filter(|&id| id != NO_TARGET).collect();
    assert_eq!(learned, [0, 1, 2, 3, 7, 8].into_iter().chain(10..20).chain(22..26).collect::<Vec<_>>());
    let mut starts = [0; 20];
    stream.copy_starts_to(6, &mut starts);
    assert_eq!(starts, [[0; 3].as_slice(), &[3], &[4; 10], &[14; 6]].concat()[..]);
    let mut targets: Vec<i32> = (6..26).collect();
    stream.mask_first_tokens(6, &mut targets);
    let none: Vec<_> = (6..).zip(&targets).filter(|(at, id)| at != *id).collect();
    assert_eq!(none, [(9, &NO_TARGET), (10, &NO_TARGET), (20, &NO_TARGET)]);
    let starts = [0, 3, 4, 8, 9, 15, 25].map(|position| stream.document_start(position));
    assert_eq!(starts, [0, 0, 4, 4, 9, 10, 20]);
    assert_eq!((stream.len(), stream.documents()), (26, 4));
}

proptest! {
    #[test]
    fn a_part_is_the_same_part_of_the_whole(
        lengths in proptest::collection::vec((1u64..6, 0u64..7), 1..12),
        cut in 1usize..12,
        from in any::<usize>(),
        to in any::<usize>(),
    ) {
        let mut segments = Vec::new();
        for documents in lengths.chunks(cut) {
            let mut end = 0;
            let documents: Vec<_> = documents.iter().map(|&(length, prompt)| {
                end += length;
                (end, prompt.min(length))
            }).collect();
            segments.push(segment(0..end as u8, &documents));
        }
        let stream = Stream::new(segments);
        let mut whole = vec![0; stream.len()];
        stream.copy_targets_to(0, &mut whole);
        let (from, to) = (from % (stream.len() + 1), to % (stream.len() + 1));
        let range = from.min(to)..from.max(to);
        let mut part = vec![0; range.len()];
        stream.copy_targets_to(range.start, &mut part);
        prop_assert_eq!(&part, &whole[range]);
    }
}
