"""`python -m fuzz`: random cases for a time, or one case again; exit status 1 if there was a fault."""

import argparse
import sys
import time

from tqdm import tqdm

from . import cores, files, steps
from .runner import Totals, run_case, run_for

KINDS = {"cores": cores.run, "steps": steps.run, "files": files.run}
SHOWN = 20  # faults in full


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Random cases for the promises of condlr_ext.")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="default: %(default)s; all kinds run at once")
    parser.add_argument("--only", choices=KINDS, help="one kind of cases")
    parser.add_argument("--case", type=int, metavar="N", help="of that kind, this case alone")
    arguments = parser.parse_args()
    kinds = {name: run for name, run in KINDS.items() if arguments.only in (None, name)}
    if arguments.case is None:
        return many(arguments.seed, arguments.seconds, kinds)
    if arguments.only is None:
        parser.error("--case needs --only")
    case = run_case(arguments.only, kinds[arguments.only], arguments.seed, arguments.case)
    print(*case.faults or ["no fault"], sep="\n")
    return 1 if case.faults else 0


def many(seed: int, seconds: float, kinds: dict) -> int:
    totals, faults, start, shown = dict.fromkeys(kinds, Totals()), 0, time.monotonic(), 0
    with tqdm(
        total=round(seconds),
        unit="s",
        bar_format="{l_bar}{bar}| {elapsed_s:.0f} of {total} s, {remaining} left{postfix}",
    ) as bar:
        try:
            for kind, so_far, number, found in run_for(seconds, kinds, seed):
                totals[kind] = so_far
                for text in found:
                    faults += 1
                    if faults <= SHOWN:
                        bar.write(
                            f"{kind}: {text}\n    PYTHONPATH=tests python -m fuzz --only {kind} --seed {seed} --case {number}"
                        )
                if (passed := int(time.monotonic() - start)) > shown:
                    shown = passed
                    cases = ", ".join(f"{t.cases} of {name}" for name, t in totals.items())
                    bar.set_postfix_str(f"{cases}, {faults} faults", refresh=False)
                    bar.update(passed - bar.n)
        except KeyboardInterrupt:
            bar.write("interrupted")
    for kind, found in totals.items():
        tried = ", ".join(f"{count} {what}" for what, count in sorted(found.counts.items()))
        closest = max(found.worst.items(), key=lambda item: item[1], default=("", 0.0))
        print(f"{kind}: {found.cases} cases: {tried}; closest to its limit: {closest[0]} {closest[1]:.2f}")
    print(f"seed {seed}, {time.monotonic() - start:.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
