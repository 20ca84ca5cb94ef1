#!/bin/sh
# Sees to it that the folder $BATON_MODEL is there: makes the small model, leaves any other to its owner.
set -eu
small_model=/models/smollm2-135m-instruct

if [ -e "$BATON_MODEL/config.json" ]; then
    echo "$BATON_MODEL is there"
elif [ "$BATON_MODEL" = "$small_model" ]; then
    echo "fetching and converting the small model, once; about a minute"
    folder="$(BATON_CACHE=/models python -m infra.local.model)"
    ln -sfn "$(basename "$folder")" "$small_model"
else
    echo "$BATON_MODEL holds no config.json: put the model there, or set MODELS and BATON_MODEL in .env" >&2
    exit 1
fi
