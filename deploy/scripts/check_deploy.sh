#!/usr/bin/env bash
# Checks deploy/ without a cluster: rules and their unit tests, the dashboard's queries, names of metrics
# and flags, manifests against the Kubernetes schemas. Needs promtool (package prometheus; PROMTOOL=PATH takes
# another) and a Python with yaml (package python3-yaml). What else is at hand is used, and what is not is said:
#   kubernetes-validate, which fetch_test_tools.sh puts into build/schemas: manifests
#   kubectl 1.21 or later: overlays       helm: the chart, which render_chart.py renders otherwise
set -euo pipefail
cd "$(dirname "$0")/../.."

promtool=${PROMTOOL:-promtool}
python=python3
export PYTHONPATH=build/schemas
"$python" -c 'import yaml' 2>/dev/null || python=/usr/bin/python3  # python3-yaml is Debian's Python's
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
skipped=()

command -v "$promtool" >/dev/null || { echo "no promtool: apt-get install prometheus" >&2; exit 1; }
"$python" -c 'import yaml' || { echo "no yaml: apt-get install python3-yaml" >&2; exit 1; }

"$promtool" check config deploy/prometheus/prometheus.yml
(cd deploy/prometheus && "$promtool" test rules rules_test.yaml)
"$python" deploy/scripts/check_deploy.py names
"$python" deploy/scripts/check_deploy.py queries "$dir/panels.yaml"
"$promtool" check rules "$dir/panels.yaml"

mapfile -t manifests < <(ls deploy/kubernetes/base/*.yaml deploy/kubernetes/components/*/*.yaml \
  deploy/gateway/inferencepool.yaml | grep -v -e kustomization.yaml -e shared-sessions/deployment.yaml)

if kubectl kustomize --help >/dev/null 2>&1; then
  for overlay in cpu gpu; do
    kubectl kustomize "deploy/kubernetes/overlays/$overlay" >"$dir/$overlay.yaml"
    manifests+=("$dir/$overlay.yaml")
  done
  mkdir "$dir/shared"  # an overlay that adds the component
  cp -r deploy/kubernetes "$dir/shared"
  sed -i 's|^components:|&\n  - ../../components/shared-sessions|' "$dir/shared/kubernetes/overlays/cpu/kustomization.yaml"
  kubectl kustomize "$dir/shared/kubernetes/overlays/cpu" >"$dir/shared.yaml"
  grep -q 'claimName: entropyserve-sessions' "$dir/shared.yaml"
  manifests+=("$dir/shared.yaml")
else
  skipped+=("overlays: no kubectl")
fi

chart=deploy/helm/entropyserve
if command -v helm >/dev/null; then
  helm lint --strict "$chart"
  template() { helm template es "$chart" "$@"; }
else
  template() { "$python" deploy/scripts/render_chart.py "$chart" "$@"; }
  skipped+=("helm: the chart is rendered by render_chart.py instead")
fi

if "$python" -c 'import kubernetes_validate' 2>/dev/null; then
  template >"$dir/chart-cpu.yaml"
  template -f "$chart/values-gpu.yaml" --set autoscaling.kind=hpa --set serviceMonitor.enabled=true \
    --set tls.secret=tls --set tls.clientCa=true >"$dir/chart-gpu.yaml"
  template --set autoscaling.kind=keda --set sessions.existingClaim=shared >"$dir/chart-keda.yaml"
  if template --set keysSecret= >/dev/null 2>&1; then
    echo "the chart accepts a server that anyone may use" >&2
    exit 1
  fi
  "$python" deploy/scripts/check_deploy.py manifests "${manifests[@]}" "$dir"/chart-*.yaml
else
  skipped+=("manifests: no kubernetes-validate; deploy/scripts/fetch_test_tools.sh fetches it")
fi
for what in "${skipped[@]}"; do echo "NOT RUN: $what"; done
