#!/usr/bin/env bash
# Gives the tests in a browser their browser: Chromium, by apt. Without root or apt it says "skipped" and why, and the
# tests skip themselves.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" > /dev/null; then
    echo "browser: $(command -v "$name")"
    exit
  fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "skipped: the tests in a browser; there is no chromium on the PATH, and only root can install it by apt-get"
elif ! { apt-get update && apt-get install --yes --no-install-recommends chromium; } > /dev/null; then
  echo "skipped: the tests in a browser; apt-get could not install chromium (its reasons are above)"
fi
