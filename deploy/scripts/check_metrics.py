#!/usr/bin/env python3
"""Runs the server under a load with a real Prometheus that scrapes it every second, and checks that

  promtool accepts the server's output, the rules and their unit tests;
  every metric that the dashboard, the rules and the documentation name is in Prometheus;
  every query of the dashboard answers with data, and no alert fires on a healthy server;
  counts agree: admitted = completed + cancelled + failed + running + waiting in every scrape, and the
  counters are the sums of the receipts;
  the load adds no series.

  check_metrics.py --server=PATH --client=PATH

Needs prometheus and promtool (Debian's package prometheus), a loopback interface and Python's own library.
Waits for events, never for times; everything that it starts ends with it.
"""
import argparse
import contextlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy/prometheus"
# A machine so slow that it takes longer is broken; no result depends on it.
PATIENCE_SECONDS = 240
COUNTS = ("admitted_total", "completed_total", "cancelled_total", "failed_total", "running_requests",
          "waiting_requests")


class Finding(Exception):
    """What the check was made to find."""


def require(ok, message):
    if not ok:
        raise Finding(message)


def wait_for(what, condition, process=None):
    """The first true value of `condition`; `process` must live meanwhile."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        require(process is None or process.poll() is None, f"{what}: the process ended")
        time.sleep(0.1)
    raise Finding(f"gave up waiting for {what}")


class Background:
    """A process whose output is kept, and which ends with the `with`."""

    def __init__(self, command, log):
        self.log = pathlib.Path(log)
        self.process = subprocess.Popen(command, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if error[0] is not None:
            print(f"--- {self.log.name}\n{self.log.read_text()[-4000:]}", file=sys.stderr)

    def find(self, pattern):
        match = re.search(pattern, self.log.read_text())
        return match and match.group(1)

    def wait(self, pattern):
        return wait_for(f"{self.log.name}: {pattern}", lambda: self.find(pattern), self.process)


def fetch(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


class Prometheus:
    def __init__(self, address):
        self.base = f"http://{address}/api/v1/"

    def get(self, path, **parameters):
        answer = json.loads(fetch(self.base + path + "?" + urllib.parse.urlencode(parameters)))
        require(answer["status"] == "success", f"{path}: {answer}")
        return answer["data"]

    def query(self, expression):
        return self.get("query", query=expression)["result"]

    def value(self, expression):
        """The sum of an instant vector; 0 when it is empty."""
        return sum(float(sample["value"][1]) for sample in self.query(expression))

    def rules(self):
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]


def promtool(*arguments, text=None, cwd=None):
    done = subprocess.run(["promtool", *arguments], input=text, cwd=cwd, capture_output=True, text=True)
    # `check metrics` ends with 3 when it only has advice; that counts, too.
    require(done.returncode == 0, f"promtool {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


class Load:
    """Calls of entropyserve-client, which sum up their receipts."""

    def __init__(self, client, address, folder):
        self.client, self.address = client, address
        self.receipts = []
        self.prompt = pathlib.Path(folder) / "prompt.txt"

    def command(self, tokens, *flags):
        return [self.client, "generate", f"--server={self.address}", "--raw=true", "--json=true",
                "--attempts=1", "--progress=off", "--ignore-eos=true", f"--max-new-tokens={tokens}",
                *flags]

    def generate(self, prompt, tokens, *flags):
        name = self.prompt.with_name(f"prompt{len(prompt)}.txt")
        name.write_text(prompt)
        done = subprocess.run(self.command(tokens, f"--file={name}", *flags), capture_output=True,
                              text=True)
        require(done.returncode == 0, f"generate: {done.stderr}")
        last = json.loads(done.stdout.splitlines()[-1])
        self.receipts.append(last["finished"]["receipt"])

    def session(self, action, *ids):
        """The id of the session that was made, forked or deleted."""
        done = subprocess.run([self.client, "session", action, *ids, f"--server={self.address}", "--json=true"],
                              capture_output=True, text=True)
        require(done.returncode == 0, f"session {action}: {done.stderr}")
        answer = json.loads(done.stdout)
        return answer.get("id") or answer["deleted"]

    def refuse(self):
        """A request that the engine accepts and fails: it can never fit."""
        done = subprocess.run(self.command(10**6, "--token-ids=5,6,7"), capture_output=True, text=True)
        require("can never fit" in done.stderr, f"a request of a million tokens: {done.stderr}")

    @contextlib.contextmanager
    def running(self):
        """A call that goes on until the `with` ends, when its caller disappears."""
        process = subprocess.Popen(self.command(10**5, "--token-ids=5,6,7"), stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
        reader = None
        try:
            # A token has come; from now on somebody must read, or the server pauses the sequence.
            while b'"tokens"' not in process.stdout.readline():
                require(process.poll() is None, "the long call ended")
            reader = threading.Thread(target=process.stdout.read)
            reader.start()
            yield
        finally:
            process.kill()
            process.wait()
            if reader:
                reader.join()


def panel_queries(window="5m"):
    """(title, query) of the dashboard, with its variables filled in."""
    dashboard = json.loads((ROOT / "deploy/grafana/entropyserve.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in (("$__rate_interval", window), ("$job", "entropyserve"),
                                    ("$instance", ".*")):
                query = query.replace(variable, value)
            yield panel["title"], query


def named_metrics():
    """Names of our metrics in everything that is read next to Prometheus."""
    files = [ROOT / "deploy/grafana/entropyserve.json", ROOT / "docs/runbook.md", ROOT / "docs/metrics.md"]
    for folder in (RULES, ROOT / "deploy/gateway", ROOT / "deploy/kubernetes", ROOT / "deploy/helm"):
        files += [path for path in folder.rglob("*.yaml")]
    names = {}
    for path in files:
        for name in re.findall(r"\bentropyserve_[a-z0-9_]+", path.read_text()):
            names.setdefault(name, path.relative_to(ROOT))
    return names


def missing_names(prometheus):
    have = set(prometheus.get("label/__name__/values"))
    histograms = {name[: -len("_bucket")] for name in have if name.endswith("_bucket")}
    missing = [f"{path}: {name}" for name, path in named_metrics().items()
               if name not in have and name not in histograms]
    return missing + [f"rule {rule['name']}" for rule in prometheus.rules()
                      if rule["type"] == "recording" and rule["name"] not in have]


def check_queries(prometheus):
    empty = [f"{title}: {query}" for title, query in panel_queries() if not prometheus.query(query)]
    require(not empty, "panels without data:\n" + "\n".join(empty))
    for rule in prometheus.rules():
        require(rule["health"] == "ok", f"rule {rule['name']}: {rule}")
        require(rule.get("state") != "firing", f"{rule['name']} fires on a healthy server")


def check_identity(prometheus):
    """Each scrape is one moment of the engine: the counts agree in every one of them."""
    series = {}
    for name in COUNTS:
        result = prometheus.query(f"entropyserve_{name}[1h]")
        require(len(result) == 1, f"entropyserve_{name}: {len(result)} series")
        series[name] = {when: float(value) for when, value in result[0]["values"]}
    for when, admitted in series["admitted_total"].items():
        parts = {name: series[name][when] for name in COUNTS[1:]}
        require(admitted == sum(parts.values()), f"at {when}: {admitted} admitted, {parts}")
    return len(series["admitted_total"])


def check_receipts(prometheus, load):
    for metric, field in (("prompt_tokens_total", "prompt_tokens"),
                          ("generated_tokens_total", "generated_tokens"),
                          ("attention_flops_executed_total", "attention_flops_executed"),
                          ("attention_flops_dense_total", "attention_flops_dense"),
                          ("kv_compression_input_bytes_total", "kv_bytes_before"),
                          ("kv_compression_output_bytes_total", "kv_bytes_after"),
                          ("request_prompt_tokens_sum", "prompt_tokens"),
                          ("prefill_seconds_sum", "prefill_seconds"),
                          ("decode_seconds_sum", "decode_seconds"),
                          ('request_seconds_sum{outcome="completed"}', "total_seconds")):
        receipts = load.receipts
        if metric.startswith("kv_"):
            receipts = [receipt for receipt in receipts if receipt.get("compressed")]
        expected = sum(float(receipt.get(field, 0)) for receipt in receipts)
        value = prometheus.value("entropyserve_" + metric)
        require(abs(value - expected) <= 1e-6 * max(1.0, expected),
                f"{metric} is {value}, the receipts' {field} is {expected}")
    require(prometheus.value("entropyserve_head_entropy_nats_count") > 0, "no entropy was observed")
    require(0 < prometheus.value("entropyserve_kv_compression_ratio_sum")
            < prometheus.value("entropyserve_kv_compression_ratio_count"), "compression saved nothing")


def check_speedup(prometheus, load):
    """The one prompt within the calibration; its steps took no longer than its whole prefill."""
    short, long = (prometheus.value(f'entropyserve_dense_prefill_seconds{{prompt="{name}"}}')
                   for name in ("4k", "4608"))
    require(short > 0 and long > 0, "no dense prefill was timed")
    judged = [receipt for receipt in load.receipts if 4096 <= int(receipt["prompt_tokens"]) <= 4608]
    least = 0
    for receipt in judged:
        tokens = int(receipt["prompt_tokens"])
        share = (tokens - 4096) / (4608 - 4096)
        least += tokens * ((1 - share) * short / 4096 + share * long / 4608) / receipt["prefill_seconds"]
    count, ratio = (prometheus.value("entropyserve_prefill_speedup_ratio_" + part) for part in ("count", "sum"))
    require(count == len(judged) == 1, f"{count} prompts were compared with dense prefills, not {len(judged)}")
    require(ratio >= least * (1 - 1e-6), f"speedup {ratio}, at least {least} by the receipt")


def wait_for_counts(prometheus, **counts):
    """Until the newest scrape has these; they only grow, or are what a held call makes them."""
    for name, count in counts.items():
        wait_for(f"{name} = {count}", lambda: prometheus.value(f"entropyserve_{name}") == count)


def run_sessions(prometheus, load, text):
    """Each of two tiers has room for one session: of three the oldest is in a file, and comes back when it is used."""
    def turn(session):
        load.generate(text[:600], 20, "--kv-budget=64", f"--session={session}")

    def wait_for_moves(**counts):
        for reason, count in counts.items():
            wait_for(f"{count} {reason}",
                     lambda: prometheus.value(f'entropyserve_session_moves_total{{reason="{reason}"}}') == count)

    sessions = [load.session("create") for _ in range(3)]
    for session in sessions:
        turn(session)
    for tier in ("device", "host", "disk"):
        for what in ("sessions", "session_bytes"):
            wait_for(f"{what} in tier {tier}",
                     lambda: prometheus.value(f'entropyserve_{what}{{tier="{tier}"}}') > 0)
    wait_for_moves(limit=3)  # one to host memory, then two one tier further
    turn(sessions[0])
    wait_for_moves(restored=1, limit=5)
    fork = load.session("fork", sessions[0])
    require(load.session("delete", fork) == fork, "another session was deleted than the fork")
    wait_for_moves(deleted=1)
    wait_for_counts(prometheus, sessions=3)
    for method, calls in (("CreateSession", 3), ("ForkSession", 1), ("DeleteSession", 1)):
        count = prometheus.value(f'entropyserve_requests_total{{method="{method}", code="OK"}}')
        require(count == calls, f"{count} calls of {method}")


def run_load(prometheus, load, answered):
    """Long and short prompts; then `answered` is checked, nothing having failed so far."""
    # Two full segments, so that heads are judged; and a policy that reads sparsely early.
    text = "the quick brown fox jumps over the lazy dog; " * 50
    sparse = ("--prefill-dense-prefix=512", "--prefill-base=1024", "--kv-budget=64")
    load.generate(text, 40, *sparse)
    run_sessions(prometheus, load, text)
    for i in range(6):
        load.generate(text[: 100 + i], 4, f"--request-id=caller-{i}")
    wait_for_counts(prometheus, completed_total=len(load.receipts), running_requests=0)
    series = prometheus.value('count({job="entropyserve", __name__=~"entropyserve_.*"})')
    # While these run, prefills, decodes and compressions happen between two scrapes.
    load.generate(text * 2, 4, *sparse)  # within the lengths of the calibration
    for i in range(6):
        load.generate(text[: 600 + i], 20, *sparse, f"--request-id=other-caller-{i}")
    wait_for_counts(prometheus, completed_total=len(load.receipts), running_requests=0)
    answered()
    require(prometheus.value('count({job="entropyserve", __name__=~"entropyserve_.*"})') == series,
            "callers of their own added series")
    load.refuse()
    with load.running():
        wait_for_counts(prometheus, running_requests=1)
    wait_for_counts(prometheus, running_requests=0, cancelled_total=1, failed_total=1)
    return series


def check(options, folder, stack):
    sessions = folder / "sessions"
    sessions.mkdir()
    server = stack.enter_context(Background(
        [options.server, "--model=synthetic:tiny", "--listen=127.0.0.1:0",
         "--metrics-listen=127.0.0.1:0", "--log-format=text", "--kv-bytes=512M",
         "--calibrate-dense-tokens=4608", f"--session-dir={sessions}", "--session-device-bytes=300K",
         "--session-host-bytes=300K"], folder / "server.log"))
    metrics = server.wait(r"metrics address=(\S+)")
    address = server.wait(r"listening address=(\S+)")
    server.wait(r"(ready) ")
    config = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
              "rule_files": [str(RULES / "recording.rules.yaml"), str(RULES / "alerts.rules.yaml")],
              "scrape_configs": [{"job_name": "entropyserve", "static_configs": [{"targets": [metrics]}]}]}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # YAML takes JSON
    process = stack.enter_context(Background(
        ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
         "--web.listen-address=127.0.0.1:0", "--log.level=info"], folder / "prometheus.log"))
    prometheus = Prometheus(process.wait(r'msg="Listening on" address=(\S+)'))
    load = Load(options.client, address, folder)

    def answered():
        try:
            wait_for("every metric", lambda: not missing_names(prometheus))
        except Finding as finding:
            raise Finding(f"{finding}: {missing_names(prometheus)}") from None
        check_queries(prometheus)
        check_receipts(prometheus, load)
        check_speedup(prometheus, load)

    series = run_load(prometheus, load, answered)
    require(series < 500, f"{series} series")
    scrapes = check_identity(prometheus)
    promtool("check", "metrics", text=fetch(f"http://{metrics}/metrics"))
    print(f"{len(load.receipts) + 2} calls, {scrapes} scrapes, {series:.0f} series, "
          f"{len(list(panel_queries()))} queries, {len(named_metrics())} names: all agree")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--client", required=True)
    options = parser.parse_args()
    try:
        promtool("check", "config", "prometheus.yml", cwd=RULES)
        promtool("test", "rules", "rules_test.yaml", cwd=RULES)
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            check(options, pathlib.Path(folder), stack)
    except Finding as finding:
        sys.exit(f"check_metrics.py: {finding}")


if __name__ == "__main__":
    main()
