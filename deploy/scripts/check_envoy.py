#!/usr/bin/env python3
"""Runs deploy/envoy/envoy.yaml with a real Envoy in front of two servers that share a session folder, and checks that

  Envoy accepts the file as it is given;
  calls of one affinity reach one server, and those of many affinities both;
  an answer streams through, a caller who disappears is cancelled behind it, and a prompt of megabytes passes;
  a server that drains gets no new calls and finishes those it has;
  a session whose server has ended continues on the other, with the tokens that it would have got.

  check_envoy.py --envoy=PATH --server=PATH --client=PATH

In the file only addresses, ports and the time between health checks are replaced. Waits for events, never for
times; everything that it starts ends with it.
"""
import argparse
import contextlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from check_metrics import ROOT, Background, Finding, fetch, require, wait_for

CONFIG = ROOT / "deploy/envoy/envoy.yaml"
TEXT = "the quick brown fox jumps over the lazy dog; " * 8


def configuration(ports):
    """envoy.yaml, listening on free ports of this machine and sending to `ports` of it."""
    text = CONFIG.read_text()

    def replace(pattern, value):
        nonlocal text
        text, count = re.subn(pattern, value, text)
        require(count > 0, f"{CONFIG}: nothing matches {pattern}")

    replace(r"port_value: 9901", "port_value: 0")
    replace(r"address: 0\.0\.0\.0, port_value: 50051", "address: 127.0.0.1, port_value: 0")
    replace(r"interval: 5s", "interval: 0.5s")
    pod = r"( *- endpoint:\n.*\n.*\{address: )entropyserve-pods\S*, port_value: 50051(\}\n)"
    replace(pod, "".join(rf"\g<1>127.0.0.1, port_value: {port}\g<2>" for port in ports))
    return text


class Server(Background):
    def __init__(self, options, folder, name):
        super().__init__([options.server, "--model=synthetic:tiny", "--listen=127.0.0.1:0", "--threads=1",
                          "--metrics-listen=127.0.0.1:0", "--kv-bytes=256M", f"--session-dir={folder}/sessions"],
                         folder / f"{name}.log")
        self.metrics = self.wait(r"metrics address=(\S+)")
        self.port = self.wait(r"listening address=\S+:(\d+)")

    def value(self, name):
        return float(re.search(rf"^entropyserve_{name} (\S+)$", fetch(f"http://{self.metrics}/metrics"), re.M)[1])


class Envoy(Background):
    """With its two clusters, as its admin page describes them."""

    def __init__(self, program, folder, ports):
        config, admin = folder / "envoy.yaml", folder / "admin"
        config.write_text(configuration(ports))
        super().__init__([program, "-c", config, "--admin-address-path", admin, "--concurrency", "1",
                          "--disable-hot-restart", "--log-level", "warning"], folder / "envoy.log")
        wait_for("Envoy's admin page", lambda: admin.exists() and admin.read_text(), self.process)
        self.admin = f"http://{admin.read_text()}"
        self.address = wait_for("Envoy's listener", self.listener, self.process)

    def listener(self):
        listeners = json.loads(fetch(self.admin + "/listeners?format=json")).get("listener_statuses", [])
        address = listeners and listeners[0]["local_address"]["socket_address"]
        return address and f"{address['address']}:{address['port_value']}"

    def hosts(self, cluster):
        """(port, healthy, calls) of a cluster's servers."""
        clusters = json.loads(fetch(self.admin + "/clusters?format=json"))["cluster_statuses"]
        found = next(c for c in clusters if c["name"] == cluster)
        for host in found.get("host_statuses", []):
            calls = {stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]}
            ill = host["health_status"].get("failed_active_health_check", False)
            yield str(host["address"]["socket_address"]["port_value"]), not ill, calls["rq_total"]

    def healthy(self):
        return [{port for port, healthy, _ in self.hosts(name) if healthy} for name in ("sessions", "any")]

    def calls(self, cluster):
        return {port: calls for port, _, calls in self.hosts(cluster)}


class Caller:
    """entropyserve-client, through Envoy."""

    def __init__(self, client, address):
        self.client, self.address = client, address

    def command(self, *arguments, affinity=""):
        flags = [f"--server={self.address}", f"--affinity={affinity}", "--attempts=1"]
        return [self.client, *arguments, *flags]

    def run(self, *arguments, affinity=""):
        done = subprocess.run(self.command(*arguments, affinity=affinity), capture_output=True, text=True)
        require(done.returncode == 0, f"{' '.join(arguments)[:200]}: {done.stderr}")
        return done.stdout

    def session(self, action, *ids, affinity):
        return json.loads(self.run("session", action, *ids, "--json=true", affinity=affinity))["id"]

    def generate(self, *flags, tokens):
        return ["generate", "--raw=true", "--json=true", "--progress=off", "--ignore-eos=true", "--temperature=0",
                "--kv-budget=64", f"--max-new-tokens={tokens}", *flags]

    def turn(self, session, text, affinity):
        """(receipt, ids) of a turn."""
        lines = self.run(*self.generate(text, f"--session={session}", tokens=12),
                         affinity=affinity).splitlines()
        events = [json.loads(line) for line in lines]
        ids = [i for event in events for i in event.get("tokens", {}).get("ids", [])]
        return events[-1]["finished"]["receipt"], ids

    @contextlib.contextmanager
    def stream(self, tokens, affinity):
        """A call whose first token has come; its process."""
        process = subprocess.Popen(self.command(*self.generate("--token-ids=5,6,7", tokens=tokens), affinity=affinity),
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            while '"tokens"' not in process.stdout.readline():
                require(process.poll() is None, "the stream ended before its first token")
            yield process
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def check_affinity(envoy, caller, ports):
    """Affinities, by the server that all of their calls reached."""
    owners = {port: [] for port in ports}
    for i in range(64):  # that all of them fall to one server is less likely than a broken machine
        affinity = f"conversation-{i}"
        before = envoy.calls("sessions")
        session = caller.session("create", affinity=affinity)
        caller.turn(session, TEXT, affinity)
        fork = caller.session("fork", session, affinity=affinity)
        for one in (fork, session):
            caller.run("session", "delete", one, affinity=affinity)
        after = envoy.calls("sessions")
        grown = {port: after[port] - before[port] for port in ports if after[port] > before[port]}
        require(len(grown) == 1 and sum(grown.values()) == 5, f"calls of {affinity} reached {grown}")
        owners[next(iter(grown))].append(affinity)
        if i >= 5 and all(owners.values()):
            break
    require(all(owners.values()), f"every affinity fell to one server: {owners}")
    return owners


def check_streams(server, caller, affinity):
    with caller.stream(10**5, affinity):
        wait_for("the stream's server to work on it", lambda: server.value("running_requests") == 1, server.process)
    wait_for("the cancel of a caller who left", lambda: server.value("cancelled_total") == 1, server.process)


def check_long_message(caller, folder):
    """One that is larger than what Envoy buffers for a retry, and without an affinity."""
    text = folder / "long.txt"
    text.write_text("word " * 2**20)
    count = caller.run("tokenize", f"--file={text}", "--count=true")
    require(int(count) == 5 * 2**20, f"{count} tokens of a long text, whose bytes are tokens")


def check_drain(envoy, servers, caller, owners):
    """One server is told to stop under a call; its session goes on where the other is."""
    first, second = owners
    affinity = owners[first][0]
    session = caller.session("create", affinity=affinity)
    caller.turn(session, TEXT, affinity)
    twin = caller.session("fork", session, affinity=affinity)
    receipt, expected = caller.turn(twin, TEXT[:99], affinity)
    with caller.stream(3000, affinity) as call:
        servers[first].process.terminate()
        wait_for("its ejection", lambda: envoy.healthy() == [{second}, {second}], envoy.process)
        before = envoy.calls("any")
        for _ in range(4):
            caller.run("models")
        after = envoy.calls("any")
        require(after[first] == before[first], "a draining server got new calls")
        require(after[second] >= before[second] + 4, "the other server did not get them")
        last = call.stdout.read().splitlines()[-1]
        require('"finished"' in last and call.wait() == 0, f"the draining server's stream ended with {last[:200]}")
    require(servers[first].process.wait() == 0, "the draining server failed")
    moved, ids = caller.turn(session, TEXT[:99], affinity)
    require(moved["cached_tokens"] == receipt["cached_tokens"], f"{moved} after the move, {receipt} before")
    require(ids == expected, f"the session said {ids} after the move, its fork {expected} before")


def check(options, folder, stack):
    done = subprocess.run([options.envoy, "--mode", "validate", "-c", CONFIG], capture_output=True, text=True)
    require(done.returncode == 0, f"Envoy refuses {CONFIG}: {done.stderr}")
    (folder / "sessions").mkdir()
    servers = [stack.enter_context(Server(options, folder, name)) for name in ("first", "second")]
    for server in servers:
        server.wait(r"(ready) ")
    servers = {server.port: server for server in servers}
    envoy = stack.enter_context(Envoy(options.envoy, folder, list(servers)))
    wait_for("both servers to be healthy", lambda: envoy.healthy() == [set(servers)] * 2, envoy.process)
    caller = Caller(options.client, envoy.address)
    owners = check_affinity(envoy, caller, list(servers))
    for port, affinities in owners.items():
        check_streams(servers[port], caller, affinities[0])
    check_long_message(caller, folder)
    check_drain(envoy, servers, caller, owners)
    print(f"{sum(map(len, owners.values()))} affinities on two servers; a stream, a cancel, a drain and a move: all well")


def main():
    parser = argparse.ArgumentParser()
    for name in ("--envoy", "--server", "--client"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            check(options, pathlib.Path(folder), stack)
    except Finding as finding:
        sys.exit(f"check_envoy.py: {finding}")


if __name__ == "__main__":
    main()
