"""Operator routes about devices."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from slmops.client.records import DeviceDetail, DeviceRecord, DeviceTokenCreated, FleetSummary
from slmops.server.api.answers import answer, documented
from slmops.server.api.callers import Operator, Served, Viewer

router = APIRouter(prefix="/v1", tags=["devices"])


class LabelChanges(BaseModel):
    """Labels to set; null removes one."""

    model_config = ConfigDict(extra="forbid")

    labels: dict[str, str | None]


class DeviceTokenWanted(BaseModel):
    """An enrolment token to make."""

    model_config = ConfigDict(extra="forbid")

    ttl_s: int = Field(default=3600, description="How long it is good for, seconds")
    uses: int = Field(default=1, description="How many devices may enrol with it")
    labels: dict[str, str] = Field(default={}, description="Labels that these devices get")


@router.get("/fleet", responses=documented(FleetSummary))
def fleet(services: Served, caller: Viewer) -> Response:
    """The fleet in numbers."""
    return answer(services.fleet.summary())


@router.get("/devices", responses=documented(list[DeviceRecord]))
def devices(services: Served, caller: Viewer, selector: str = "", retired: bool = False) -> Response:
    """Devices that a label selector matches, by id."""
    return answer(services.fleet.devices(selector, retired=retired))


@router.get("/devices/{device_id}", responses=documented(DeviceDetail))
def device(device_id: str, services: Served, caller: Viewer) -> Response:
    """One device with the history of its outcomes."""
    return answer(services.fleet.device(device_id))


@router.patch("/devices/{device_id}/labels", responses=documented(DeviceRecord))
def set_labels(device_id: str, changes: LabelChanges, services: Served, caller: Operator) -> Response:
    """Set and remove labels."""
    return answer(services.fleet.set_labels(caller, device_id, changes.labels))


@router.post("/devices/{device_id}/retire", responses=documented(DeviceRecord))
def retire(device_id: str, services: Served, caller: Operator) -> Response:
    """Refuse this device from now on."""
    return answer(services.fleet.retire(caller, device_id))


@router.post("/device-tokens", status_code=201, responses=documented(DeviceTokenCreated, 201))
def create_token(wanted: DeviceTokenWanted, services: Served, caller: Operator) -> Response:
    """Make an enrolment token; it is shown this once."""
    created = services.access.create_enrolment_token(caller, wanted.ttl_s, wanted.uses, wanted.labels)
    return answer(created, 201)
