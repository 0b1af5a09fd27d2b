#!/usr/bin/env bash
# Checks deploy/ without a cluster: rules and their unit tests, the dashboard's queries, names of metrics
# and flags, manifests against the Kubernetes schemas. Needs
#   apt-get install prometheus python3-yaml    (promtool; PROMTOOL=PATH takes another)
#   pip install kubernetes-validate            (in the environment of PYTHON, default python3)
# Overlays are rendered where kubectl is at hand (1.21 or later), the chart where helm is; where they are
# not, that is said, and only the base and the components are checked.
set -euo pipefail
cd "$(dirname "$0")/../.."

promtool=${PROMTOOL:-promtool}
python=${PYTHON:-python3}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
skipped=()

command -v "$promtool" >/dev/null || { echo "no promtool: apt-get install prometheus" >&2; exit 1; }
"$python" -c 'import yaml, kubernetes_validate' ||
  { echo "pip install kubernetes-validate for $python" >&2; exit 1; }

"$promtool" check config deploy/prometheus/prometheus.yml
(cd deploy/prometheus && "$promtool" test rules rules_test.yaml)
"$python" deploy/scripts/check_deploy.py names
"$python" deploy/scripts/check_deploy.py queries "$dir/panels.yaml"
"$promtool" check rules "$dir/panels.yaml"

mapfile -t manifests < <(ls deploy/kubernetes/base/*.yaml deploy/kubernetes/components/*/*.yaml \
  deploy/gateway/inferencepool.yaml | grep -v kustomization.yaml)

if kubectl kustomize --help >/dev/null 2>&1; then
  for overlay in cpu gpu; do
    kubectl kustomize "deploy/kubernetes/overlays/$overlay" >"$dir/$overlay.yaml"
    manifests+=("$dir/$overlay.yaml")
  done
else
  skipped+=("overlays: no kubectl")
fi

chart=deploy/helm/entropyserve
if command -v helm >/dev/null; then
  helm lint --strict "$chart"
  helm template es "$chart" >"$dir/chart-cpu.yaml"
  helm template es "$chart" -f "$chart/values-gpu.yaml" --set autoscaling.kind=hpa \
    --set serviceMonitor.enabled=true --set tls.secret=tls --set tls.clientCa=true >"$dir/chart-gpu.yaml"
  helm template es "$chart" --set autoscaling.kind=keda >"$dir/chart-keda.yaml"
  manifests+=("$dir"/chart-*.yaml)
  if helm template es "$chart" --set keysSecret= >/dev/null 2>&1; then
    echo "the chart accepts a server that anyone may use" >&2
    exit 1
  fi
else
  skipped+=("chart: no helm")
fi

"$python" deploy/scripts/check_deploy.py manifests "${manifests[@]}"
for what in "${skipped[@]}"; do echo "NOT RUN: $what"; done
