#!/usr/bin/env bash
# Makes what Dockerfile and docker-compose.yml pull, for an engine that reaches no image registry: Debian by
# debootstrap in place of python, Kafka and Apicurio from Maven, Prometheus from Debian. Under the same tags, so that
# the product's files are tried as they stand. What the engine has, or can pull, is left alone. Needs root.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/compose
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python_image=$(sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile)
image_of() { sed -n "s|^ *image: \($1:.*\)|\1|p" docker-compose.yml; }
missing() {
  docker image inspect "$1" > /dev/null 2>&1 && return 1
  docker pull --quiet "$1" > /dev/null 2>&1 && return 1
  echo "standing in for $1"
}
build() { # IMAGE CONTEXT
  DOCKER_BUILDKIT=0 docker build --quiet --network host --build-arg BASE="$python_image" --tag "$1" "$2" > /dev/null 2>&1
}

if missing "$python_image"; then
  root=$scratch/root
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" > /dev/null
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  # the host's certificates, with what its network adds to them: pip runs in here
  cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  tar -C "$root" -c . | docker import \
    --change "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_DEFAULT_TIMEOUT=180" \
    --change 'CMD ["python3"]' - "$python_image" > /dev/null
fi

kafka_image=$(image_of apache/kafka)
if missing "$kafka_image"; then
  cp -r $here/kafka "$scratch/kafka"
  mvn -q -B -f tests/kafka/pom.xml dependency:copy-dependencies -DincludeScope=runtime \
    -DoutputDirectory="$scratch/kafka/libs"
  build "$kafka_image" "$scratch/kafka"
fi

prometheus_image=$(image_of prom/prometheus)
if missing "$prometheus_image"; then
  build "$prometheus_image" $here/prometheus
fi

registry_image=$(image_of apicurio/apicurio-registry)
if missing "$registry_image"; then
  cp -r $here/registry "$scratch/registry"
  mvn -q -B dependency:copy -Dmdep.stripVersion=true -DoutputDirectory="$scratch/registry" \
    -Dartifact="io.apicurio:apicurio-registry-app:${registry_image##*:}:tar.gz:all"
  build "$registry_image" "$scratch/registry"
fi
