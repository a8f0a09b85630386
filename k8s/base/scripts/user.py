"""Make the user NEW_USERNAME, or give the one that is there NEW_PASSWORD; as the administrator of MLFLOW_TRACKING_*."""

import os

from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

client = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
name, password = os.environ["NEW_USERNAME"], os.environ["NEW_PASSWORD"]
try:
    client.get_user(name)
except MlflowException as error:
    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
        raise
    client.create_user(name, password)
    print(f"user {name} is made")
else:
    client.update_user_password(name, password)
    print(f"user {name} was there; its password is that of the secret now")
