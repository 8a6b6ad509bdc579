"""Operator routes about blueprints and rollouts."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from slmops.client.records import (
    AuditRecord,
    BlueprintApplied,
    BlueprintPlan,
    BlueprintRecord,
    RolloutDetail,
    RolloutRecord,
)
from slmops.server.api.answers import answer, documented
from slmops.server.api.callers import Operator, Served, Viewer
from slmops.server.services.words import rfc3339

router = APIRouter(prefix="/v1", tags=["rollouts"])


class BlueprintSource(BaseModel):
    """A blueprint as text."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(description="YAML with one kind: Blueprint")
    source_name: str = Field(
        default="blueprint.yaml", description="File name for error messages", max_length=300
    )


class Reason(BaseModel):
    """Why; kept in the audit trail."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(default="", max_length=2000)


@router.post("/blueprints/plan", responses=documented(BlueprintPlan))
def plan(blueprint: BlueprintSource, services: Served, caller: Viewer) -> Response:
    """What applying this text would do; changes nothing."""
    return answer(services.blueprints.plan(caller, blueprint.source, blueprint.source_name))


@router.post("/blueprints", responses=documented(BlueprintApplied))
def apply(blueprint: BlueprintSource, services: Served, caller: Operator) -> Response:
    """Declare the state of a cohort; begins a rollout when that changes anything."""
    return answer(services.blueprints.apply(caller, blueprint.source, blueprint.source_name))


@router.get("/blueprints", responses=documented(list[BlueprintRecord]))
def blueprints(services: Served, caller: Viewer) -> Response:
    """The current revision of each blueprint."""
    return answer(services.blueprints.records())


@router.get("/blueprints/{name}", responses=documented(BlueprintRecord))
def blueprint(name: str, services: Served, caller: Viewer) -> Response:
    """The current revision of one blueprint."""
    return answer(services.blueprints.record(name))


@router.get("/blueprints/{name}/history", responses=documented(list[BlueprintRecord]))
def blueprint_history(name: str, services: Served, caller: Viewer) -> Response:
    """All revisions of one blueprint, newest first."""
    return answer(services.blueprints.history(name))


@router.get("/rollouts", responses=documented(list[RolloutRecord]))
def rollouts(services: Served, caller: Viewer) -> Response:
    """All rollouts, newest first."""
    return answer(services.rollout_views.records())


@router.get("/rollouts/{rollout_id}", responses=documented(RolloutDetail))
def rollout(rollout_id: str, services: Served, caller: Viewer) -> Response:
    """One rollout with its waves, devices and the last judgement."""
    return answer(services.rollout_views.detail(rollout_id))


@router.post("/rollouts/{rollout_id}/{action}", responses=documented(RolloutRecord))
def act(
    rollout_id: str, action: str, services: Served, caller: Operator, why: Reason | None = None
) -> Response:
    """Approve, reject, pause, resume, abort or rollback."""
    services.rollouts.act_on(caller, rollout_id, action, why.reason if why is not None else "")
    return answer(services.rollout_views.record(rollout_id))


@router.get("/audit", tags=["audit"], responses=documented(list[AuditRecord]))
def audit(services: Served, caller: Viewer, limit: int = 100) -> Response:
    """Who did what, newest first."""
    with services.store.read() as tx:
        rows = tx.journal.audit_trail(max(1, min(limit, 1000)))
    return answer(
        [
            AuditRecord(
                id=row.id,
                at=rfc3339(row.at),
                actor=row.actor,
                action=row.action,
                subject=row.subject,
                detail=row.detail,
            )
            for row in rows
        ]
    )
