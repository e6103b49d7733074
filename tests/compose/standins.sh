#!/usr/bin/env bash
# Makes what Dockerfile and docker-compose.yml pull, for an engine that reaches no image registry: Debian by
# debootstrap in place of python, Kafka from Maven's jars in place of apache/kafka. Under the same tags, so that
# the product's files are tried as they stand. What the engine already has is left alone. Needs root.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/compose

python_image=$(sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile)
kafka_image=$(sed -n 's/^ *image: \(apache\/kafka:.*\)/\1/p' docker-compose.yml)

has() { docker image inspect "$1" > /dev/null 2>&1; }
obtain() { has "$1" || docker pull --quiet "$1" > /dev/null 2>&1; }

if ! obtain "$python_image"; then
  echo "standing in for $python_image"
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" > /dev/null
  # the host's certificates, with what its network adds to them: pip runs in here
  cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  tar -C "$root" -c . | docker import \
    --change "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_DEFAULT_TIMEOUT=180" \
    --change 'CMD ["python3"]' - "$python_image" > /dev/null
fi

if ! obtain "$kafka_image"; then
  echo "standing in for $kafka_image"
  context=$(mktemp -d)
  mvn -q -B -f tests/kafka/pom.xml dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$context/libs"
  cp $here/kafka/Dockerfile $here/kafka/run "$context/"
  DOCKER_BUILDKIT=0 docker build --quiet --network host --build-arg BASE="$python_image" --tag "$kafka_image" "$context"
  rm -rf "$context"
fi
