#!/bin/sh
# Dump the database that PGHOST, PGDATABASE and so on name to FILE, and see that the dump can be read.
set -eu
pg_dump --format=custom --no-owner --no-privileges --file="$1"
tables=$(pg_restore --list "$1" | grep -c " TABLE DATA ")
echo "dumped $tables tables"
[ "$tables" -gt 0 ]
