"""Bring the database to the schema of this MLflow: its own tables, and those of basic-auth. An empty one is filled."""

import os

from mlflow.db import commands as tracking
from mlflow.server.auth.db.cli import commands as users

uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
tracking.main(["upgrade", uri], standalone_mode=False)
users.main(["upgrade", "--url", uri], standalone_mode=False)
print("the schema is that of this MLflow")
