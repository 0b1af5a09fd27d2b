#!/usr/bin/env python3
"""A load test, and a picture of the dashboard's main panels from what Prometheus saw of it.

  plot_dashboard.py --server=PATH --client=PATH --model=PATH --text=FILE... --out=docs/dashboard.png [--seconds=240]
                    [-- SERVER FLAGS]

Callers ask about pieces of the texts, of 1 000 to 12 000 characters: four at a time in the middle third of the
test, one before and two after it. Queries are the dashboard's own, drawn from Prometheus' query API. Needs
prometheus (Debian), matplotlib and pillow (PyPI).
"""
import argparse
import contextlib
import io
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402: the backend comes first
from PIL import Image  # noqa: E402

from check_metrics import ROOT, Background, Prometheus, panel_queries

WINDOW = "60s"  # of rates: the test is short
PANELS = (("Generate calls by outcome", "calls/s"), ("Time to first token", "s"),
          ("Gap between tokens", "s"), ("Attention executed", "of dense"),
          ("KV cache: logical and physical", "MB"), ("Requests in the engine", "requests"))


def caller(options, address, text, seed, begin, end, folder):
    """One caller, from `begin` to `end` (monotonic seconds)."""
    rng = random.Random(seed)
    time.sleep(max(0, begin - time.monotonic()))
    question = folder / f"question{seed}.txt"
    while time.monotonic() < end:
        size = rng.choice((1000, 2000, 4000, 12000))
        at = rng.randrange(len(text) - size)
        question.write_text(text[at:at + size] + "\n\nSum this up.")
        command = [options.client, "generate", f"--server={address}", f"--file={question}", "--receipt=false",
                   "--progress=off", f"--max-new-tokens={rng.choice((32, 64, 96))}", f"--seed={seed}"]
        # One caller in eight loses patience.
        patience = rng.uniform(1, 5) if rng.random() < 0.125 else None
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=patience)


def run(options, address, folder):
    text = "\n".join(path.read_text() for path in options.text)
    start, third = time.monotonic(), options.seconds / 3
    # (from, to) of each caller, in thirds of the test.
    plan = ((0, 3), (1, 3), (1, 2), (1, 2))
    threads = [threading.Thread(target=caller, args=(options, address, text, seed, start + begin * third,
                                                     start + end * third, folder))
               for seed, (begin, end) in enumerate(plan)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def draw(prometheus, begin, end, out):
    dashboard = json.loads((ROOT / "deploy/grafana/entropyserve.json").read_text())
    legends = {target["expr"]: target.get("legendFormat", "") for panel in dashboard["panels"]
               for target in panel.get("targets", [])}
    figure, axes = plt.subplots(2, 3, figsize=(12, 5.6), dpi=80, constrained_layout=True)
    for axis, (title, unit) in zip(axes.flat, PANELS):
        for expression, legend in legends.items():
            query = expression.replace("$__rate_interval", WINDOW).replace("$job", "entropyserve")
            query = query.replace("$instance", ".*")
            if (title, query) not in list(panel_queries(WINDOW)):
                continue
            scale = 1e-6 if unit == "MB" else 1
            for series in prometheus.get("query_range", query=query, start=begin, end=end, step=1)["result"]:
                values = [(float(t) - begin, float(v) * scale) for t, v in series["values"]]
                label = legend.replace("{{code}}", series["metric"].get("code", ""))
                if any(value > 0 for _, value in values):
                    axis.plot(*zip(*values), label=label, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, end - begin)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("seconds", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(out, optimize=True)


def main():
    arguments = sys.argv[1:]
    flags = arguments[arguments.index("--") + 1:] if "--" in arguments else []
    parser = argparse.ArgumentParser()
    for name in ("server", "client", "model", "out"):
        parser.add_argument("--" + name, required=True)
    parser.add_argument("--text", required=True, nargs="+", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=240)
    options = parser.parse_args(arguments[:len(arguments) - len(flags) - bool(flags)])
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        server = stack.enter_context(Background(
            [options.server, f"--model={options.model}", "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
             "--log-format=text", *flags], folder / "server.log"))
        metrics = server.wait(r"metrics address=(\S+)")
        address = server.wait(r"listening address=(\S+)")
        server.wait(r"(ready) ")
        (folder / "prometheus.yml").write_text(json.dumps(
            {"global": {"scrape_interval": "1s"}, "scrape_configs": [
                {"job_name": "entropyserve", "static_configs": [{"targets": [metrics]}]}]}))
        process = stack.enter_context(Background(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             "--web.listen-address=127.0.0.1:0"], folder / "prometheus.log"))
        prometheus = Prometheus(process.wait(r'msg="Listening on" address=(\S+)'))
        begin = time.time()
        run(options, address, folder)
        draw(prometheus, begin, time.time(), options.out)


if __name__ == "__main__":
    main()
