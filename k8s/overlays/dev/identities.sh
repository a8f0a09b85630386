#!/bin/sh
# Write the identities of SeaweedFS to FILE: each key of the environment with its own bucket, and none with another's.
set -eu
umask 077
identity() { # NAME KEY SECRET BUCKET ACTION...
  name=$1 key=$2 secret=$3 bucket=$4
  shift 4
  case $key$secret in *[!A-Za-z0-9+/=_-]*)
    echo "error: kubealign-s3-$name: expected letters, digits and +/=_- in access_key and secret_key" >&2
    exit 1
    ;;
  esac
  [ -n "$key" ] && [ -n "$secret" ] || { echo "error: kubealign-s3-$name: access_key or secret_key is empty" >&2; exit 1; }
  actions=
  for action in "$@"; do actions="$actions${actions:+,}\"$action:$bucket\""; done
  printf '{"name":"%s","credentials":[{"accessKey":"%s","secretKey":"%s"}],"actions":[%s]}' "$name" "$key" "$secret" "$actions"
}
{
  printf '{"identities":['
  identity mlflow "$MLFLOW_ACCESS_KEY" "$MLFLOW_SECRET_KEY" kubealign-mlflow Read List Write Tagging
  printf ','
  identity backups "$BACKUPS_ACCESS_KEY" "$BACKUPS_SECRET_KEY" kubealign-backups Read List Write
  printf ','
  identity state "$STATE_ACCESS_KEY" "$STATE_SECRET_KEY" kubealign-state Read List Write
  printf ','
  identity data "$DATA_ACCESS_KEY" "$DATA_SECRET_KEY" kubealign-data Read List
  printf ','
  identity contributors "$CONTRIBUTORS_ACCESS_KEY" "$CONTRIBUTORS_SECRET_KEY" kubealign-data Read List Write
  printf ']}\n'
} > "$1"
