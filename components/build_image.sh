#!/bin/sh
# Inside an image's build, which has /opt/tools: /opt/venv with the locked packages of one extra of pyproject.toml, and
# its bill of materials.
set -eu
extra=$1
python -m venv --without-pip /opt/venv
/opt/tools/bin/python tools/install_locked.py "$extra" --venv /opt/venv --torch-index "${TORCH_INDEX:-}"
/opt/tools/bin/python -m pip --python /opt/venv/bin/python check
# What no step imports: the packages' own tests, and torch's headers and test programs.
packages=/opt/venv/lib/python3.11/site-packages
find "$packages" -type d -name tests -prune -exec rm -rf {} +
rm -rf "$packages"/torch/test "$packages"/torch/include "$packages"/torch/bin/*[tT]est*
# Byte code of what steps do import, a fifth of all: importing is fast and the image small.
if [ "$extra" = data ]; then
  modules="kfp.dsl.executor_main mlflow.pyfunc mlflow.artifacts dvc.api dvc.repo dvc_s3 s3fs boto3 great_expectations pandas
    transformers.models.auto.tokenization_auto transformers.models.llama.tokenization_llama jinja2 typer phonenumbers
    stdnum.luhn stdnum.cn.ric"
elif [ "$extra" = server ]; then
  modules="mlflow.cli mlflow.server.auth mlflow.server.fastapi_app mlflow.store.tracking.sqlalchemy_store uvicorn psycopg2 boto3"
else
  modules="kfp.dsl.executor_main mlflow.artifacts boto3 torch transformers.models.auto.modeling_auto peft accelerate
    transformers.models.llama.modeling_llama transformers.generation.utils safetensors.torch matplotlib.figure scipy.stats
    jinja2 typer torch.distributed.fsdp"
fi
PYTHONDONTWRITEBYTECODE= /opt/venv/bin/python -c "
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
" $modules
# Not validated against its schema: the library wrote it, and that takes more than half a minute of CPU.
/opt/tools/bin/cyclonedx-py environment --no-validate --of JSON -o /opt/venv/sbom.cdx.json /opt/venv/bin/python
