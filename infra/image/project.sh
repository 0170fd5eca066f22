#!/bin/sh
# Makes the shared project folder ready: code, buckets, DVC's remote, the flows' deployments.
# Run again it changes nothing that is right. Needs the object store and Prefect's server.
set -eu
cd "$GENARENA_HOME"

if [ ! -e dvc.yaml ]; then
  if [ -n "${GENARENA_REPOSITORY:-}" ]; then
    git clone "$GENARENA_REPOSITORY" .
  else
    cp -R /opt/genarena/. .
    git init -q
    git add -A
    git -c user.name=genarena -c user.email=genarena@localhost commit -qm "genarena, as the image has it"
  fi
fi
ln -sfn /opt/venv .venv

python /opt/genarena/infra/image/buckets.py mlflow dvc
dvc remote add --quiet --local --default --force store s3://dvc
dvc remote modify --quiet --local store endpointurl "$AWS_ENDPOINT_URL"

prefect work-pool inspect genarena > /dev/null 2>&1 || prefect work-pool create genarena --type process
prefect --no-prompt deploy --all
