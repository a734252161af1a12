#!/usr/bin/env bash
# Start the MLflow server. Secrets are read from files and passed in the environment, so that no process list shows them.
set -euo pipefail
export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
PGPASSWORD=$(cat /run/secrets/postgres_password)
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat /run/secrets/mlflow_admin_password)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat /run/secrets/mlflow_secret_key)
export MLFLOW_AUTH_CONFIG_PATH=/opt/mlflow/mlflow_auth.ini
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 \
  --backend-store-uri postgresql://mlflow@postgres/mlflow \
  --serve-artifacts --artifacts-destination /artifacts
