# One image for every Flower process of docker-compose.yml, and for the app.
FROM python:3.12-slim

ARG SITES="int4 int8-a int8-b float32"
# A volume takes over the owner of the folder that it is first mounted on.
RUN useradd --uid 49999 --create-home --home-dir /srv/prowd prowd \
    && cd /srv/prowd && install -d -o prowd -g prowd keys state home data samples prowd-runs \
    && cd keys && install -d -o prowd -g prowd authority operator server serverapp proxy \
        sites clientapps \
    && for site in $SITES; do \
        install -d -o prowd -g prowd sites/$site clientapps/$site ../samples/$site; done

WORKDIR /srv/prowd/app
# For pip, as an index that holds PyTorch without CUDA, which is ten times smaller.
ARG PIP_OPTIONS=""
COPY pyproject.toml README.md LICENSE ./
COPY prowd prowd
COPY core core
COPY quant quant
COPY privacy privacy
COPY task task
COPY exchange exchange
COPY strategies strategies
COPY client_app client_app
COPY server_app server_app
COPY deploy deploy
RUN pip install --no-cache-dir $PIP_OPTIONS .

USER prowd
