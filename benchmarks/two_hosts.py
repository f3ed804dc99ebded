"""Train on two hosts, lose one, start again: the same end as when nothing happens. Needs root and `ip` on Linux.

    OMP_NUM_THREADS=1 python benchmarks/two_hosts.py docs/results/two_hosts

The hosts are network namespaces of this machine, joined by one cable; each starts `torchrun` with the first one's
address, as on real hosts, and they share the output folder. In the middle of training one host dies: its processes are
killed and its cable is cut, so that no answer tells of their end. The other has to end by itself, after
`training.ddp_timeout`. Then both are started again. Writes OUT_STEM.json and a record into OUT_STEM.md, between two
marks.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from downstream import ROOT, machine, write_tables
from survival import Setup, fingerprint, kill, steps_logged, write_images, write_recipe

from modeling_ehm.training.mask_log import read_mask_log

HOSTS = {"ehm-a": "10.77.0.1", "ehm-b": "10.77.0.2"}  # network namespace, address
SETUP = Setup(streaming=True, workers=0, processes=2)
TIMEOUT, MAX_END = 30, 60  # seconds that a process waits for another, and in which the host that is left has to end


def shell(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def build_network() -> None:
    first, second = HOSTS
    for name in HOSTS:
        shell(f"ip netns add {name}")
    shell(f"ip link add cable-a netns {first} type veth peer name cable-b netns {second}")
    for name, end in zip(HOSTS, ("cable-a", "cable-b"), strict=True):
        shell(f"ip -n {name} addr add {HOSTS[name]}/24 dev {end}")
        shell(f"ip -n {name} link set {end} up")
        shell(f"ip -n {name} link set lo up")


def remove_network() -> None:
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(host: str, recipe: Path) -> subprocess.Popen:
    """torchrun on one of the hosts; what it says is appended to log-HOST.txt beside the recipe."""
    number = list(HOSTS).index(host)
    address, interface = next(iter(HOSTS.values())), ("cable-a", "cable-b")[number]
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--node_rank", str(number), "--nproc_per_node", "1", "--master_addr", address, "--master_port", "29511"]
    command += [str(ROOT / "train_ehm.py"), str(recipe), f"training.ddp_timeout={TIMEOUT}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    with open(recipe.with_name(f"log-{host}.txt"), "a") as log:
        return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=log, stderr=log)


def run(recipe: Path) -> None:
    """Both hosts to the end.

    Raises:
        RuntimeError: one of them failed.
    """
    processes = {host: start(host, recipe) for host in HOSTS}
    for host, process in processes.items():
        if process.wait() != 0:
            raise RuntimeError(f"{host} failed:\n{recipe.with_name(f'log-{host}.txt').read_text()[-8000:]}")


def lose_one(recipe: Path) -> float:
    """Seconds from the death of the second host to the end of the first.

    Raises:
        RuntimeError: it ended too early, without an error, or not at all.
    """
    first, second = (start(host, recipe) for host in HOSTS)
    out = recipe.parent / "out"
    while not (out / "checkpoint-10").exists():
        if first.poll() is not None:
            raise RuntimeError(f"ended too early:\n{recipe.with_name('log-ehm-a.txt').read_text()[-4000:]}")
        time.sleep(0.01)
    logged = steps_logged(out)
    while steps_logged(out) == logged and first.poll() is None:
        time.sleep(0.001)
    shell("ip -n ehm-b link set cable-b down")
    kill(second)
    lost = time.monotonic()
    try:
        if first.wait(timeout=600) == 0:
            raise RuntimeError("the host that was left ended without an error")
    except subprocess.TimeoutExpired:
        kill(first)
        raise RuntimeError("the host that was left did not end in 10 minutes") from None
    seconds = time.monotonic() - lost
    shell("ip -n ehm-b link set cable-b up")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    options = parser.parse_args()
    remove_network()
    build_network()
    try:
        with tempfile.TemporaryDirectory() as name:
            files = write_images(Path(name))
            unbroken, lost = (write_recipe(Path(name) / part, SETUP, files) for part in ("unbroken", "lost"))
            run(unbroken)
            seconds = lose_one(lost)
            run(lost)
            expected, found = (fingerprint(recipe.parent / "out") for recipe in (unbroken, lost))
            log = read_mask_log(lost.parent / "out")
            starts = json.loads((lost.parent / "out" / "run.json").read_text())["starts"]
    finally:
        remove_network()
    differing = sorted(name for name in expected if expected[name] != found.get(name))
    record = {
        "seconds_to_end": seconds,
        "resumed_from": starts[-1]["resumed_from"],
        "steps": len(log),
        "compared": len(expected),
        "differing": differing,
    }
    options.out_stem.parent.mkdir(parents=True, exist_ok=True)
    options.out_stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = f"""{datetime.date.today()}; {machine()}; two network namespaces, one process each.

One host lost: the other ended after {seconds:.1f} seconds. Started again from {record["resumed_from"]}, {len(log)}
steps in all. Compared with a run that lost nothing: {len(expected)} files and figures, differing:
{", ".join(differing) or "none"}.
"""
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(text)
    if differing or seconds > MAX_END:
        sys.exit("a host that was lost changed the run, or held up the other")


if __name__ == "__main__":
    main()
