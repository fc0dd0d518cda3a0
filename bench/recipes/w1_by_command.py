"""W1 by the command that README recommends: `sadmoe convert` of the dense classifier's folder, on the sentences alone.

bench/recipes/fetch.sh data && python bench/recipes/w1_by_command.py --data data --out runs [--quick]

Two minutes for the dense model, 24 for the command and 3 to measure, on two cores; --quick only shows that all of it
runs. The command gets no labels, and imitates hidden states alone, where w1_movie_polarity.py imitates logits, too.
Accuracy at several tau, beside dense, as that does it. Needs `sadmoe` in the PATH; a killed run goes on.
"""

import argparse
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

from recipe import finish
from results import Results
from run import CPU, TINY, Run
from sadmoe import DynamicK
from sadmoe.texts import load_model
from sources import movie_polarity
from w1_movie_polarity import workload
from workload import controls

OPTIONS = "--budget 0.4 --expert-size 8 --router-width 96 --projections 400 --sparsify 600 --finetune 600"
QUICK = "--budget 0.4 --expert-size 8 --router-width 96 --projections 2 --sparsify 2 --finetune 5"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that fetch.sh filled")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    name = "w1-by-command-quick" if args.quick else "w1-by-command"
    run = Run(name, TINY if args.quick else CPU, args.data, args.out, sizes=(8,), device="cpu")
    work, tokenizer = workload(run)
    dense, converted, texts = (run.state / part for part in ("dense", "converted", "texts.txt"))
    work.dense.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    sentences = movie_polarity(run.data)["train"][: run.effort.train]
    texts.write_text("\n".join(text for text, _ in sentences) + "\n")
    options = [*shlex.split(QUICK if args.quick else OPTIONS), "--checkpoint", run.state / "command"]
    if not converted.exists():
        with run.stage("sadmoe convert"):
            command = ["sadmoe", "convert", "--model", dense, "--data", texts, "--out", converted, *options]
            subprocess.run(command, check=True)
    with run.stage("controls"):
        values = work.dense_values()
        facts = {"controls": controls(work, values.tests), "after": {}, "router_r2": {}}
    results = Results(work, run, values, facts | {"effort": asdict(run.effort)})
    gates = [(f"tau {tau:g}", DynamicK(tau)) for tau in run.effort.taus]
    results.add("sadmoe, dynamic k, s = 8", load_model(converted), gates, timed=True)
    finish(results)


if __name__ == "__main__":
    main()
