//! The same samples under every layout, each window once an epoch, and held-out text that training never sees.

use proptest::prelude::*;

use super::*;
use crate::data::stream::{DocumentList, NO_TARGET, Segment};
use crate::data::{Source, Tokens};
use crate::exit::{Classified, ExitCode};

/// A corpus whose tokens are their own positions.
fn counting(length: usize) -> Corpus {
    Corpus::of_tokens(Tokens::U32((0..length as u32).collect()), "", "")
}

fn spec(sequence_length: usize, global_batch: usize) -> LoaderSpec {
    LoaderSpec {
        rank: 0,
        world: 1,
        seed: 7,
        global_batch,
        micro_batch: 8,
        sequence_length,
        validation_fraction: 0.1,
        eval_batches: 0,
        document_mask: false,
    }
}

/// All sequences of a step or of the evaluation, as (number, inputs, targets), put together from every rank and pass.
fn gathered(corpus: &Corpus, spec: &LoaderSpec, step: Option<u64>) -> Vec<(u64, Vec<i32>, Vec<i32>)> {
    let mut rows = Vec::new();
    let mut batch = Batch::default();
    let mut passes = Vec::new();
    for rank in 0..spec.world {
        let loader = Loader::new(corpus, LoaderSpec { rank, ..spec.clone() }).unwrap();
        passes.push(if step.is_some() { loader.passes() } else { loader.eval_passes() });
        for pass in 0..passes[rank] {
            match step {
                Some(step) => loader.train_pass(step, pass, &mut batch),
                None => loader.eval_pass(pass, &mut batch),
            }
            assert!(batch.sequences <= spec.micro_batch);
            assert_eq!(batch.tokens(), batch.sequences * spec.sequence_length);
            assert_eq!(batch.first_sample - batch.first_in_step, step.unwrap_or(0) * spec.global_batch as u64);
            let both = batch.inputs.chunks(spec.sequence_length).zip(batch.targets.chunks(spec.sequence_length));
            rows.extend((batch.first_sample..).zip(both).map(|(number, (i, t))| (number, i.to_vec(), t.to_vec())));
        }
    }
    assert!(passes.windows(2).all(|pair| pair[0] == pair[1]), "all ranks make the same number of passes: {passes:?}");
    rows
}

#[test]
fn every_layout_sees_the_same_samples_in_the_same_order() {
    let corpus = counting(5000);
    for global_batch in [1, 10, 16] {
        for step in [Some(0), Some(3), Some(1000), None] {
            let alone = gathered(&corpus, &spec(32, global_batch), step);
            for world in [1, 2, 3, 4, 16] {
                for micro_batch in [1, 2, 3, 8, 100] {
                    let layout = LoaderSpec { world, micro_batch, ..spec(32, global_batch) };
                    assert_eq!(gathered(&corpus, &layout, step), alone, "{world} ranks, passes of {micro_batch}");
                }
            }
        }
    }
}

#[test]
fn shares_differ_by_at_most_one_and_a_rank_may_have_nothing() {
    for (count, world) in [(10, 4), (3, 16), (16, 16), (0, 3), (7, 1)] {
        let shares: Vec<_> = (0..world).map(|rank| share(count, world, rank)).collect();
        assert_eq!(shares.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
        let sizes = shares.iter().map(ExactSizeIterator::len);
        assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1, "{shares:?}");
    }
    let loader = Loader::new(&counting(1000), LoaderSpec { rank: 15, world: 16, ..spec(8, 3) }).unwrap();
    let mut batch = Batch::default();
    assert_eq!(loader.passes(), 1);
    loader.train_pass(0, 0, &mut batch);
    assert_eq!((batch.sequences, batch.tokens(), batch.valid_targets()), (0, 0, 0));
}

#[test]
fn a_pass_replaces_what_the_one_before_left() {
    let loader = Loader::new(&counting(2000), LoaderSpec { micro_batch: 3, ..spec(8, 4) }).unwrap();
    let (mut used, mut fresh) = (Batch::default(), Batch::default());
    loader.train_pass(0, 0, &mut used);
    let capacity = used.inputs.capacity();
    loader.train_pass(0, 1, &mut used);
    loader.train_pass(0, 1, &mut fresh);
    assert_eq!(used, fresh);
    loader.train_pass(1, 0, &mut used);
    assert_eq!(used.inputs.capacity(), capacity, "nothing is allocated again");
}

#[test]
fn the_held_out_text_is_the_last_tenth_and_is_evaluated_whole() {
    let corpus = counting(1003);
    let loader = Loader::new(&corpus, spec(16, 4)).unwrap();
    assert_eq!(loader.train_tokens(), 902);
    let rows = gathered(&corpus, &spec(16, 4), None);
    let targets: Vec<i32> = rows.iter().flat_map(|(_, _, t)| t.iter().copied()).filter(|&t| t != NO_TARGET).collect();
    assert_eq!(targets, (903..1003).collect::<Vec<i32>>());
    for (_, inputs, targets) in &rows {
        assert!(inputs.iter().zip(targets).all(|(&i, &t)| t == NO_TARGET || t == i + 1));
    }
    let limited = gathered(&corpus, &LoaderSpec { eval_batches: 1, ..spec(16, 4) }, None);
    assert_eq!(limited, rows[..4]);
    let none = Loader::new(&corpus, LoaderSpec { validation_fraction: 0.0, ..spec(16, 4) }).unwrap();
    assert_eq!((none.train_tokens(), none.eval_passes()), (1003, 0));
}

/// A source whose tokens count on from `first`, in documents of ten tokens, of which the first `prompt` are given.
fn source(name: &str, weight: Option<f64>, first: u32, length: u32, prompt: u64) -> Source {
    let mut list = DocumentList::default();
    (1..=u64::from(length) / 10).for_each(|document| list.push(10 * document, prompt));
    let segment = Segment { tokens: Tokens::U32((first..first + length).collect()), documents: list.finish() };
    Source { name: name.into(), weight, tag: 0, stream: Stream::new([segment]) }
}

#[test]
fn the_cut_falls_between_documents_and_prompts_are_never_targets() {
    let corpus = Corpus { sources: vec![source("", None, 0, 1000, 3)], ..counting(1) };
    let settings = LoaderSpec { validation_fraction: 0.104, ..spec(16, 4) };
    let loader = Loader::new(&corpus, settings.clone()).unwrap();
    assert_eq!(loader.train_tokens(), 890, "896 moves back to a document's start");
    let rows = (0..14).flat_map(|step| gathered(&corpus, &settings, Some(step)));
    let all: Vec<i32> = rows.chain(gathered(&corpus, &settings, None)).flat_map(|(.., targets)| targets).collect();
    assert!(all.contains(&NO_TARGET) && all.contains(&83) && all.contains(&993));
    assert!(all.iter().all(|&target| target == NO_TARGET || target % 10 >= 3));
}

#[test]
fn documents_that_are_kept_apart_know_their_start_and_are_not_predicted_from_each_other() {
    let corpus = Corpus { sources: vec![source("", None, 0, 1000, 3)], ..counting(1) };
    let settings = LoaderSpec { document_mask: true, micro_batch: 4, ..spec(16, 4) };
    let loader = Loader::new(&corpus, settings.clone()).unwrap();
    let check = |batch: &Batch| {
        let starts = batch.starts.as_ref().unwrap();
        assert_eq!(starts.len(), batch.inputs.len());
        for (at, (&start, &target)) in starts.iter().zip(&batch.targets).enumerate() {
            let (sequence, input) = (at / 16 * 16, batch.inputs[at]);
            // Tokens are their own positions, in documents of ten; padding has no target.
            let padding = at > sequence && input == 0;
            let expected = (input / 10 * 10 - batch.inputs[sequence]).max(0);
            assert!(padding || start == expected, "token {input} of {:?}", &batch.inputs[sequence..sequence + 16]);
            let learned = !padding && (input + 1) % 10 >= 3;
            assert_eq!(target, if learned { input + 1 } else { NO_TARGET });
        }
    };
    let mut batch = Batch::default();
    for step in 0..13 {
        loader.train_pass(step, 0, &mut batch);
        check(&batch);
    }
    for pass in 0..loader.eval_passes() {
        loader.eval_pass(pass, &mut batch);
        check(&batch);
    }
    let together = Loader::new(&corpus, LoaderSpec { document_mask: false, ..settings }).unwrap();
    together.train_pass(0, 0, &mut batch);
    assert_eq!(batch.starts, None);
}

#[test]
fn a_mixture_keeps_its_weights_under_every_layout_and_holds_out_of_each_source() {
    let sources = vec![source("a", Some(3.0), 0, 400, 0), source("b", Some(1.0), 10_000, 4000, 0)];
    let corpus = Corpus { sources, ..counting(1) };
    let rows: Vec<_> = (0..10).flat_map(|step| gathered(&corpus, &spec(20, 8), Some(step))).collect();
    let of_b = rows.iter().filter(|(_, inputs, _)| inputs[0] >= 10_000).count();
    assert_eq!((rows.len(), of_b), (80, 20));
    assert!(rows.iter().all(|(_, _, targets)| !targets.contains(&360) && !targets.contains(&13_600)));
    let split = LoaderSpec { world: 4, micro_batch: 1, ..spec(20, 8) };
    assert_eq!((0..10).flat_map(|step| gathered(&corpus, &split, Some(step))).collect::<Vec<_>>(), rows);
    // Of the 2 windows of a and the 20 of b five, in proportion.
    let held_out = gathered(&corpus, &LoaderSpec { eval_batches: 1, ..spec(20, 5) }, None);
    let firsts: Vec<i32> = held_out.iter().map(|(_, inputs, _)| inputs[0]).collect();
    assert_eq!(firsts, [360, 13_600, 13_620, 13_640, 13_660]);
    // Without weights, samples follow the sizes.
    let sources = corpus.sources.iter().map(|each| Source { weight: None, ..each.clone() }).collect();
    let corpus = Corpus { sources, ..counting(1) };
    let rows: Vec<_> = (0..11).flat_map(|step| gathered(&corpus, &spec(20, 8), Some(step))).collect();
    assert_eq!(rows.iter().filter(|(_, inputs, _)| inputs[0] < 10_000).count(), 8);
}

#[test]
fn held_out_text_of_its_own_leaves_all_of_the_rest_for_training() {
    let validation = source("", None, 5000, 50, 0).stream;
    let corpus = Corpus { validation: Some(validation), ..counting(1000) };
    let loader = Loader::new(&corpus, spec(16, 4)).unwrap();
    assert_eq!((loader.train_tokens(), loader.eval_windows()), (1000, 4));
    let rows = gathered(&corpus, &spec(16, 4), None);
    assert!(rows.iter().all(|(_, inputs, _)| inputs[0] >= 5000));
}

#[test]
fn a_source_that_is_too_short_is_named() {
    let corpus = Corpus { sources: vec![source("a", None, 0, 400, 0), source("b", None, 0, 20, 0)], ..counting(1) };
    let text = Loader::new(&corpus, spec(32, 1)).unwrap_err().to_string();
    assert!(text.starts_with("the training text of data.sources.b is 1"), "{text}");
}

#[test]
fn seeds_and_epochs_order_the_samples_differently_and_the_same_seed_the_same() {
    let corpus = counting(5000);
    let order = |seed: u64, first: u64| {
        let loader = Loader::new(&corpus, LoaderSpec { seed, ..spec(16, 4) }).unwrap();
        let (mut inputs, mut targets) = ([0; 16], [0; 16]);
        let mut starts = Vec::new();
        for number in first..first + loader.windows_per_epoch() {
            loader.sample(number).copy_to(&mut inputs, &mut targets);
            starts.push(inputs[0]);
        }
        starts
    };
    let windows = Loader::new(&corpus, spec(16, 4)).unwrap().windows_per_epoch();
    assert_eq!(order(1, 0), order(1, 0));
    assert_ne!(order(1, 0), order(2, 0));
    assert_ne!(order(1, 0), order(1, windows));
    let offsets: std::collections::HashSet<_> = (0..8).map(|epoch| order(1, epoch * windows)[0] % 16).collect();
    assert!(offsets.len() > 1, "epochs start at different tokens");
}

#[test]
fn text_shorter_than_a_sequence_is_refused_with_both_lengths() {
    let error = Loader::new(&counting(20), spec(32, 1)).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::BadData);
    let text = error.to_string();
    assert!(text.contains("the training text is 18 tokens long"), "{text}");
    assert!(text.contains("train.sequence_length = 32") && text.contains("needs 33"), "{text}");
    let error = Loader::new(&counting(5), LoaderSpec { validation_fraction: 0.1, ..spec(2, 1) }).unwrap_err();
    assert!(error.to_string().contains("the held-out text is 1 tokens long"), "{error}");
}

#[test]
fn the_cursor_counts_what_was_seen() {
    let loader = Loader::new(&counting(1000), spec(9, 10)).unwrap();
    assert_eq!(loader.windows_per_epoch(), 99);
    assert_eq!(loader.cursor(0), Cursor { step: 0, samples_seen: 0, epoch: 0 });
    assert_eq!(loader.cursor(10), Cursor { step: 10, samples_seen: 100, epoch: 1 });
}

proptest! {
    #[test]
    fn an_epoch_visits_every_window_once_and_never_the_held_out_text(
        length in 3usize..600,
        sequence_length in 1usize..40,
        seed in any::<u64>(),
        epoch in 0u64..5,
        validation_fraction in 0.0f64..0.9,
    ) {
        let settings = LoaderSpec { seed, validation_fraction, ..spec(sequence_length, 1) };
        let Ok(loader) = Loader::new(&counting(length), settings) else { return Ok(()) };
        let (mut inputs, mut targets) = (vec![0; sequence_length], vec![0; sequence_length]);
        let mut seen: Vec<i32> = Vec::new();
        for number in 0..loader.windows_per_epoch() {
            loader.sample(epoch * loader.windows_per_epoch() + number).copy_to(&mut inputs, &mut targets);
            prop_assert!(inputs.iter().zip(&targets).all(|(i, t)| i + 1 == *t));
            seen.extend(&targets);
        }
        seen.sort_unstable();
        // Consecutive windows: their targets are one unbroken stretch, each token once.
        prop_assert!(seen.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{seen:?}");
        prop_assert!(*seen.last().unwrap() < loader.train_tokens() as i32);
        prop_assert!(loader.train_tokens() - seen.len() <= 2 * sequence_length, "little is left out");
    }
}
