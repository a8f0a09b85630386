#!/bin/sh
# Inside an image's build: /opt/venv with the locked packages of one extra of pyproject.toml, and its bill of materials.
set -eu
extra=$1
python -m venv /opt/tools
/opt/tools/bin/python -m pip install -q -c requirements.lock pip cyclonedx-bom
python -m venv --without-pip /opt/venv
install() { /opt/tools/bin/python -m pip --python /opt/venv/bin/python install -q -c requirements.lock "$@"; }
python -c "
import sys, tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))['project']
print(*project['dependencies'], *project['optional-dependencies'][sys.argv[1]], sep='\n')
" "$extra" > wanted.txt
if [ "$extra" = train ] && [ -n "${TORCH_INDEX:-}" ]; then
  install --no-deps --index-url "$TORCH_INDEX" torch
fi
install -r wanted.txt
/opt/tools/bin/python -m pip --python /opt/venv/bin/python check
/opt/tools/bin/cyclonedx-py environment --of JSON -o /opt/venv/sbom.cdx.json /opt/venv/bin/python
