#!/bin/sh
# Put the dump FILE in place of what the database holds: all of it, or nothing after an error.
set -eu
pg_restore --no-owner --no-privileges --schema=public --file="$1.sql" "$1"
{
  echo "DROP SCHEMA public CASCADE; CREATE SCHEMA public;"
  cat "$1.sql"
} | psql --quiet --single-transaction --set=ON_ERROR_STOP=1 >/dev/null
echo "restored"
