#!/bin/sh
# Put the dump FILE in place of what the database holds: all of it, or nothing after an error.
set -eu
{
  echo "DROP SCHEMA public CASCADE; CREATE SCHEMA public;"
  pg_restore --no-owner --no-privileges --file=- "$1" | grep -v -e "^CREATE SCHEMA public;" -e "^COMMENT ON SCHEMA public "
} | psql --quiet --single-transaction --set=ON_ERROR_STOP=1 >/dev/null
echo "restored"
