# The MLflow server of compose.yaml, with password authentication and PostgreSQL.
FROM python:3.12-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
RUN pip install "mlflow[auth]==3.17.2" "psycopg2-binary>=2.9,<3"
RUN useradd --create-home --uid 1000 mlflow && mkdir /artifacts /auth && chown mlflow /artifacts /auth
COPY mlflow_auth.ini mlflow_server.sh /opt/mlflow/
USER mlflow
ENTRYPOINT ["bash", "/opt/mlflow/mlflow_server.sh"]
