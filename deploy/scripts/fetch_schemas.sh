#!/usr/bin/env bash
# Fetches the Kubernetes schemas that check_deploy.sh judges manifests by (Python package kubernetes-validate,
# 22 MB) into build/schemas, and prints that folder. Nothing is installed anywhere else.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=build/schemas
if [[ ! -d $folder/kubernetes_validate ]]; then
  deploy/scripts/install_deps.sh demo >&2  # pip
  mkdir -p build
  work=$(mktemp -d build/schemas.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  python3 -m pip install --quiet --only-binary :all: --target "$work" kubernetes-validate==1.37.0 >&2
  mv "$work" "$folder"
fi
echo "$folder"
