//! `moe-launch bench collectives`: what the ranks of a job exchange and add up, at sizes from small to large.
//!
//! Counted as NCCL's own tests count: the size is what one rank sends (all_to_all_v, reduce_scatter), gets (all_gather) or holds
//! (all_reduce, broadcast); algorithm bandwidth is that over the time; bus bandwidth is what has to cross a rank's link, whatever the
//! number of ranks W: times (W − 1)/W, for all_reduce twice that, for broadcast as it is.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use moe_kernels::{Backend, View, ViewMut};
use moe_runtime::collectives::{Communicator, ReduceOp, consecutive};
use moe_runtime::config::{Config, Precision};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked, World, set_threads};
use serde::Serialize;

use super::measure::{commit, failed, gbs, is_host, print_json, random};
use super::ranks::{connect, slowest_ms, together};
use crate::out::say;

/// Collectives over the ranks that a launcher started.
#[derive(Args)]
pub(crate) struct CollectivesArgs {
    /// Only this collective; may be given several times.
    #[arg(long, value_enum, value_name = "NAME")]
    collective: Vec<Which>,
    /// Size in MiB a rank; may be given several times. Default: 1 to 1024 between GPUs, 0.25 to 16 between CPUs.
    #[arg(long, value_name = "MIB")]
    mib: Vec<f64>,
    /// Where the buffers are.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
enum Which {
    AllToAllV,
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
}

impl Which {
    /// Bus bandwidth over algorithm bandwidth.
    fn bus_factor(self, ranks: usize) -> f64 {
        let others = (ranks - 1) as f64 / ranks as f64;
        match self {
            Self::AllToAllV | Self::ReduceScatter | Self::AllGather => others,
            Self::AllReduce => 2.0 * others,
            Self::Broadcast => 1.0,
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
    }
}

#[derive(Serialize)]
struct Report {
    device: String,
    commit: String,
    ranks: usize,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    collective: Which,
    bytes: usize,
    us: f64,
    algorithm_gbs: f64,
    bus_gbs: f64,
}

pub(crate) fn run(args: &CollectivesArgs) -> Result<ExitCode, Failure> {
    if let Some(wrong) = args.mib.iter().find(|mib| !(0.001..=16384.0).contains(*mib)) {
        return Err(Failure::new(Code::Usage, format!("--mib {wrong}: accepted: 0.001 to 16384")));
    }
    let measure = |world: &World| {
        set_threads(&Config::default(), world)?;
        let device = Device::choose(args.device, Precision::Auto, world)?;
        device.visit(Measure { args, world, name: device.describe() })
    };
    together(measure, |report| show(report, args.json))
}

fn show(report: &Report, json: bool) -> Result<(), Failure> {
    if json {
        return print_json(report);
    }
    say!("{} ranks on {}, commit {}", report.ranks, report.device, report.commit)?;
    say!("{:<16}{:>10}{:>12}{:>16}{:>10}", "collective", "MiB", "us", "algorithm GB/s", "bus GB/s")?;
    for Case { collective, bytes, us, algorithm_gbs, bus_gbs } in &report.cases {
        let mib = *bytes as f64 / f64::from(1 << 20);
        say!("{:<16}{mib:>10.2}{us:>12.1}{algorithm_gbs:>16.1}{bus_gbs:>10.1}", collective.name())?;
    }
    Ok(())
}

struct Measure<'a> {
    args: &'a CollectivesArgs,
    world: &'a World,
    name: String,
}

impl OnDevice for Measure<'_> {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<Report, Failure> {
        let Self { args, world, name } = self;
        let group = connect(world, &device)?;
        let sizes: &[f64] = match &*args.mib {
            [] if is_host(&device)? => &[0.25, 1.0, 4.0, 16.0],
            [] => &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0],
            given => given,
        };
        let chosen = if args.collective.is_empty() { Which::value_variants() } else { &args.collective };
        let mut cases = Vec::new();
        for &collective in chosen {
            for mib in sizes {
                // A share of 64 elements for each rank: no collective's buffers have to be cut elsewhere.
                let unit = 4 * 64 * group.size();
                let bytes = ((mib * f64::from(1 << 20)) as usize / unit).max(1) * unit;
                let ms = time(world, &device, &group, (collective, bytes))?;
                let algorithm_gbs = gbs(bytes as f64, ms);
                let bus_gbs = algorithm_gbs * collective.bus_factor(group.size());
                cases.push(Case { collective, bytes, us: 1e3 * ms, algorithm_gbs, bus_gbs });
            }
        }
        Ok(Report { device: name, commit: commit(), ranks: group.size(), cases })
    }
}

/// Milliseconds of one collective on the slowest rank.
fn time<B: Backend, C: Communicator<B>>(
    world: &World,
    device: &B,
    group: &C,
    (collective, bytes): (Which, usize),
) -> Result<f64, Failure> {
    let (size, act) = (group.size(), bytes / <B::Act as moe_kernels::Element>::BYTES);
    let floats = |len, what| device.alloc::<f32>(len, what).map_err(failed);
    let acts = |len, what| device.alloc::<B::Act>(len, what).map_err(failed);
    match collective {
        Which::AllToAllV => {
            let (send, mut recv) = (random(device, act, 1.0)?, acts(act, "received")?);
            let rows: Vec<_> = consecutive(vec![act / size; size]).collect();
            slowest_ms(world, device, group, || {
                let (outgoing, incoming) = ((View::of(&send), &*rows), (ViewMut::of(&mut recv), &*rows));
                device.wait(&group.all_to_all_v(device, 1, outgoing, incoming)?);
                Ok(())
            })
        }
        Which::AllReduce => {
            let mut buffer = floats(bytes / 4, "sums")?;
            slowest_ms(world, device, group, || {
                device.wait(&group.all_reduce(device, ViewMut::of(&mut buffer), ReduceOp::Sum)?);
                Ok(())
            })
        }
        Which::ReduceScatter => {
            let (send, mut recv) = (floats(bytes / 4, "addends")?, floats(bytes / 4 / size, "sums")?);
            slowest_ms(world, device, group, || {
                device.wait(&group.reduce_scatter(device, View::of(&send), ViewMut::of(&mut recv), ReduceOp::Sum)?);
                Ok(())
            })
        }
        Which::AllGather => {
            let (send, mut recv) = (random(device, act / size, 1.0)?, acts(act, "gathered")?);
            slowest_ms(world, device, group, || {
                device.wait(&group.all_gather(device, View::of(&send), ViewMut::of(&mut recv))?);
                Ok(())
            })
        }
        Which::Broadcast => {
            let mut buffer = random(device, act, 1.0)?;
            slowest_ms(world, device, group, || {
                device.wait(&group.broadcast(device, ViewMut::of(&mut buffer), 0)?);
                Ok(())
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bus_bandwidth_is_counted_as_nccls_tests_do() {
        let table = [
            (Which::AllToAllV, 2, 0.5),
            (Which::AllToAllV, 4, 0.75),
            (Which::AllReduce, 4, 1.5),
            (Which::ReduceScatter, 8, 0.875),
            (Which::AllGather, 1, 0.0),
            (Which::Broadcast, 4, 1.0),
        ];
        for (which, ranks, factor) in table {
            assert!((which.bus_factor(ranks) - factor).abs() < 1e-12, "{which:?} on {ranks}");
        }
        assert_eq!(Which::AllToAllV.name(), "all_to_all_v");
    }
}
