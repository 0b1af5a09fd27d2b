#!/usr/bin/env python3
"""Checks that deploy/ and docs/ agree with the server and with Kubernetes.

  check_deploy.py names                 metrics, flags, alerts and runbook sections against the sources
  check_deploy.py queries OUT           writes the dashboard's queries as rules, for promtool
  check_deploy.py manifests FILE...     Kubernetes schemas (package kubernetes-validate), grace periods

Run from the repository's root; check_deploy.sh does. Exits 1 and names every finding.
"""
import json
import pathlib
import re
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
# Custom resources: their schemas come with their operators, not with Kubernetes.
CUSTOM = {"ServiceMonitor", "ScaledObject", "InferencePool", "Gateway", "HTTPRoute"}
# The oldest and the newest Kubernetes that manifests must fit.
VERSIONS = ("1.27", "1.37")
# Kubernetes' own time to stop a container after the drain, seconds.
MARGIN = 5
# What a slow volume takes of the idle sessions that a server writes when it ends, bytes per second.
WRITE_RATE = 250e6


def texts():
    """(path, text) of everything that may name a metric or a flag."""
    files = [p for p in DEPLOY.rglob("*") if p.is_file() and "scripts" not in p.parts]
    for path in files + [ROOT / "docs/runbook.md", ROOT / "docs/metrics.md"]:
        yield path.relative_to(ROOT), path.read_text()


def exported():
    """Names of the metrics that the server exports, and which of them are histograms."""
    source = "".join(p.read_text() for p in sorted((ROOT / "server").glob("metrics*.cc")))
    names = set(re.findall(r'"(entropyserve_[a-z0-9_]+)"', source))
    return names, set(re.findall(r'Histogram(?:Family)?\(\s*"(entropyserve_[a-z0-9_]+)"', source))


def rules(name):
    groups = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def environment():
    """Environment names of the server's flags."""
    server = (ROOT / "server/flags.cc").read_text()
    policy = (ROOT / "proto/policy_flags.cc").read_text()
    flags = re.findall(r'Add(?:Bytes|Choice)?\("([a-z0-9-]+)"', server)
    flags += re.findall(r'\{"([a-z0-9-]+)", "[a-z_]+"', policy)
    return {"ENTROPYSERVE_" + flag.upper().replace("-", "_") for flag in flags + ["config"]}


def check_names():
    found = []
    names, histograms = exported()
    known = names | {h + suffix for h in histograms for suffix in ("_bucket", "_sum", "_count")}
    recorded = {rule["record"] for rule in rules("recording.rules.yaml")}
    flags = environment()
    if len(names) < 20 or len(flags) < 50:
        found.append(f"sources are not understood: {len(names)} metrics, {len(flags)} flags")
    for path, text in texts():
        for name in set(re.findall(r"\bentropyserve_[a-z0-9_]+", text)) - known:
            found.append(f"{path}: the server exports no {name}")
        for name in set(re.findall(r"\bentropyserve:[a-z0-9_]+(?::[a-z0-9_]+)?", text)) - recorded:
            # An image tag looks the same in prose; rules have two colons.
            if name.count(":") == 2:
                found.append(f"{path}: no rule records {name}")
        code = "\n".join(line.split("#")[0] for line in text.splitlines())
        for name in set(re.findall(r"\bENTROPYSERVE_[A-Z][A-Z0-9_]*", code)) - flags:
            if path.suffix != ".md":
                found.append(f"{path}: no flag is read from {name}")
    metrics = (ROOT / "docs/metrics.md").read_text()
    runbook = (ROOT / "docs/runbook.md").read_text()
    tests = (DEPLOY / "prometheus/rules_test.yaml").read_text()
    found += [f"docs/metrics.md: {n} is missing" for n in names if f"| `{n}` |" not in metrics]
    alerts = {rule["alert"] for rule in rules("alerts.rules.yaml")}
    for alert in alerts:
        if f"### {alert}\n" not in runbook:
            found.append(f"docs/runbook.md: no section {alert}")
        if f"alertname: {alert}\n" not in tests:
            found.append(f"rules_test.yaml: {alert} never fires")
    sections = set(re.findall(r"^### (Entropyserve\w+)$", runbook, re.M))
    found += [f"docs/runbook.md: {name} is no alert" for name in sections - alerts]
    return found, f"{len(names)} metrics, {len(recorded)} recorded, {len(alerts)} alerts"


def write_queries(out):
    dashboard = json.loads((DEPLOY / "grafana/entropyserve.json").read_text())
    queries = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
    for variable, value in (("$__rate_interval", "5m"), ("$job", "entropyserve"), ("$instance", ".*")):
        queries = [query.replace(variable, value) for query in queries]
    group = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(queries)]
    pathlib.Path(out).write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": group}]}))
    return [] if queries else ["the dashboard has no query"], f"{len(queries)} queries"


def check_grace(where, spec, config):
    """SIGTERM must leave the whole drain and the writing of sessions, and preStop comes before it."""
    drain = float(config.get("ENTROPYSERVE_DRAIN_SECONDS", "30"))
    stop = float(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    size = config.get("ENTROPYSERVE_SESSION_DIR_BYTES", "0G")
    write = int(size.removesuffix("G")) * 2**30 / WRITE_RATE if "ENTROPYSERVE_SESSION_DIR" in config else 0
    grace = spec.get("terminationGracePeriodSeconds", 30)
    if grace >= stop + drain + write + MARGIN:
        return []
    return [f"{where}: {grace} s of grace do not hold preStop {stop} s, drain {drain} s and {write:.0f} s of writing"]


def check_manifests(files):
    import kubernetes_validate  # only here: names and queries need no package of pip

    found, count, skipped = [], 0, set()
    for file in files:
        documents = [d for d in yaml.safe_load_all(pathlib.Path(file).read_text()) if d]
        maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
        for document in documents:
            where = f"{file}: {document['kind']} {document['metadata']['name']}"
            if document["kind"] in CUSTOM:
                skipped.add(document["kind"])
                continue
            count += 1
            for version in VERSIONS:
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except Exception as error:  # its own types, and jsonschema's
                    first = str(error).splitlines()[0]  # the rest is the whole schema
                    found.append(f"{where}: Kubernetes {version}: {first}")
            if document["kind"] == "Deployment" and maps:
                spec = document["spec"]["template"]["spec"]
                name = spec["containers"][0]["envFrom"][0]["configMapRef"]["name"]
                found += check_grace(where, spec, maps[name])
    note = f", no schema for {', '.join(sorted(skipped))}" if skipped else ""
    return found, f"{count} objects against Kubernetes {' and '.join(VERSIONS)}{note}"


def main(args):
    if args[:1] == ["names"]:
        found, summary = check_names()
    elif args[:1] == ["queries"] and len(args) == 2:
        found, summary = write_queries(args[1])
    elif args[:1] == ["manifests"] and len(args) > 1:
        found, summary = check_manifests(args[1:])
    else:
        sys.exit(__doc__)
    for line in sorted(found):
        print(line, file=sys.stderr)
    print(f"{args[0]}: {summary}, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
