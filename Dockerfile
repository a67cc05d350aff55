# One image for every Flower process of docker-compose.yml, and for the app.
FROM python:3.12-slim

RUN useradd --uid 49999 --create-home --home-dir /srv/prowd prowd \
    # A volume takes over the owner of the folder that it is first mounted on.
    && install -d -o prowd -g prowd /srv/prowd/keys /srv/prowd/state /srv/prowd/home \
        /srv/prowd/prowd-runs /srv/prowd/keys/authority /srv/prowd/keys/operator \
        /srv/prowd/keys/server /srv/prowd/keys/proxy \
        /srv/prowd/keys/sites/int4 /srv/prowd/keys/sites/int8-a \
        /srv/prowd/keys/sites/int8-b /srv/prowd/keys/sites/float32

WORKDIR /srv/prowd/app
# For pip, as an index that holds PyTorch without CUDA, which is ten times smaller.
ARG PIP_OPTIONS=""
COPY pyproject.toml README.md LICENSE ./
COPY quant quant
COPY task task
COPY strategies strategies
COPY client_app client_app
COPY server_app server_app
COPY experiments experiments
COPY deploy deploy
RUN pip install --no-cache-dir $PIP_OPTIONS .

USER prowd
