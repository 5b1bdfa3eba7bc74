"""Tables of the registry.

Times are seconds since 1970 in UTC; ``settings`` and ``metrics`` are JSON. Nothing here is a tensor: an
artefact's folder is named beside its digest, and the folder is the truth about what it holds.
"""

from __future__ import annotations

VERSION = 2
"""Of the tables; a registry of a later version is refused, one of an earlier version is brought up to this one."""

TABLES = """
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE emulators (
    digest       TEXT PRIMARY KEY,
    model        TEXT,                    -- name of the full model
    model_digest TEXT NOT NULL,
    folder       TEXT NOT NULL,
    settings     TEXT NOT NULL,
    code_version TEXT NOT NULL,
    created      REAL NOT NULL
) STRICT;

CREATE TABLE tenants (
    name        TEXT PRIMARY KEY,
    state       TEXT NOT NULL CHECK (state IN ('admitted', 'paused', 'cancelled', 'revoked')),
    reason      TEXT,
    settings    TEXT NOT NULL,
    token_hash  TEXT NOT NULL,
    changed     REAL NOT NULL
) STRICT;

CREATE TABLE rounds (
    number   INTEGER PRIMARY KEY,
    emulator TEXT NOT NULL REFERENCES emulators (digest),
    start    TEXT,                        -- digest of the aggregate it begins with; NULL: the emulator as it is
    quorum   INTEGER NOT NULL CHECK (quorum >= 1),
    state    TEXT NOT NULL CHECK (state IN ('open', 'closed', 'finished', 'failed')),
    reason   TEXT,
    opened   REAL NOT NULL,
    deadline REAL,
    ended    REAL
) STRICT;

-- At most one round is under way.
CREATE UNIQUE INDEX one_round_under_way ON rounds ((1)) WHERE state IN ('open', 'closed');

CREATE TABLE parts (
    round    INTEGER NOT NULL REFERENCES rounds (number),
    tenant   TEXT NOT NULL REFERENCES tenants (name),
    state    TEXT NOT NULL CHECK (state IN ('waiting', 'tuning', 'submitted', 'late', 'missing', 'failed')),
    reason   TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    changed  REAL NOT NULL,
    start_id TEXT,                        -- of the latest start, so that one that is told of twice counts once
    PRIMARY KEY (round, tenant)
) STRICT, WITHOUT ROWID;

CREATE TABLE submissions (
    round       INTEGER NOT NULL,         -- it counts in
    tenant      TEXT NOT NULL,
    tuned_round INTEGER NOT NULL REFERENCES rounds (number),
    digest      TEXT NOT NULL,
    folder      TEXT NOT NULL,
    bytes       INTEGER NOT NULL,
    norm        REAL NOT NULL,
    weight      REAL NOT NULL CHECK (weight >= 0),
    metrics     TEXT NOT NULL,
    data_digest TEXT,                     -- HMAC under the tenant's own key, so that it tells nobody else anything
    received    REAL NOT NULL,
    settings    TEXT NOT NULL DEFAULT '{}',  -- what it was tuned with
    code_version TEXT NOT NULL DEFAULT '',   -- of the program that tuned it
    PRIMARY KEY (round, tenant),
    FOREIGN KEY (round, tenant) REFERENCES parts (round, tenant)
) STRICT, WITHOUT ROWID;

CREATE INDEX submissions_by_tenant ON submissions (tenant, digest);

-- What counted in a round before it had a result, and then did not any more.
CREATE TABLE withdrawals (
    round     INTEGER NOT NULL REFERENCES rounds (number),
    tenant    TEXT NOT NULL REFERENCES tenants (name),
    digest    TEXT NOT NULL,
    reason    TEXT NOT NULL,
    withdrawn REAL NOT NULL
) STRICT;

CREATE TABLE refusals (
    tenant TEXT NOT NULL,                 -- '(unknown)': all that did not show who they are
    reason TEXT NOT NULL,
    count  INTEGER NOT NULL,
    last   REAL NOT NULL,
    PRIMARY KEY (tenant, reason)
) STRICT, WITHOUT ROWID;

CREATE TABLE plug_ins (
    name         TEXT NOT NULL,           -- a tenant's, or 'aggregate'
    version      INTEGER NOT NULL,
    round        INTEGER NOT NULL REFERENCES rounds (number),
    digest       TEXT NOT NULL,
    folder       TEXT NOT NULL,
    state        TEXT NOT NULL CHECK (state IN ('active', 'revoked')),
    reason       TEXT,
    settings     TEXT NOT NULL,
    code_version TEXT NOT NULL,
    created      REAL NOT NULL,
    PRIMARY KEY (name, version)
) STRICT, WITHOUT ROWID;

-- At most one version for each round is in force.
CREATE UNIQUE INDEX one_active_version ON plug_ins (name, round) WHERE state = 'active';

-- Which submissions a plug-in was made from.
CREATE TABLE lineage (
    name    TEXT NOT NULL,
    version INTEGER NOT NULL,
    round   INTEGER NOT NULL,
    tenant  TEXT NOT NULL,
    PRIMARY KEY (name, version, round, tenant),
    FOREIGN KEY (name, version) REFERENCES plug_ins (name, version),
    FOREIGN KEY (round, tenant) REFERENCES submissions (round, tenant)
) STRICT, WITHOUT ROWID;
"""

UPGRADES = {
    1: """
ALTER TABLE parts ADD COLUMN start_id TEXT;
ALTER TABLE submissions ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
ALTER TABLE submissions ADD COLUMN code_version TEXT NOT NULL DEFAULT '';
CREATE TABLE withdrawals (
    round     INTEGER NOT NULL REFERENCES rounds (number),
    tenant    TEXT NOT NULL REFERENCES tenants (name),
    digest    TEXT NOT NULL,
    reason    TEXT NOT NULL,
    withdrawn REAL NOT NULL
) STRICT;
""",
}
"""By version: what makes the next one of it."""
