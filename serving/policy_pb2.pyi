from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Strategy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STRATEGY_UNSPECIFIED: _ClassVar[Strategy]
    LEARNED: _ClassVar[Strategy]
    POPULARITY: _ClassVar[Strategy]
    RANDOM: _ClassVar[Strategy]
STRATEGY_UNSPECIFIED: Strategy
LEARNED: Strategy
POPULARITY: Strategy
RANDOM: Strategy

class HistoryEntry(_message.Message):
    __slots__ = ("item_id", "name", "timestamp_ms", "value")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_MS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    name: str
    timestamp_ms: int
    value: float
    def __init__(self, item_id: _Optional[str] = ..., name: _Optional[str] = ..., timestamp_ms: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("item_id", "category", "brand", "price", "vector")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    BRAND_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    category: str
    brand: str
    price: float
    vector: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, item_id: _Optional[str] = ..., category: _Optional[str] = ..., brand: _Optional[str] = ..., price: _Optional[float] = ..., vector: _Optional[_Iterable[float]] = ...) -> None: ...

class RecommendRequest(_message.Message):
    __slots__ = ("user_id", "session_id", "slate_size", "history", "candidates", "exclude_item_ids", "timestamp_ms", "epsilon", "exclude_seen", "unlogged")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SLATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_MS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SEEN_FIELD_NUMBER: _ClassVar[int]
    UNLOGGED_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    session_id: str
    slate_size: int
    history: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    exclude_item_ids: _containers.RepeatedScalarFieldContainer[str]
    timestamp_ms: int
    epsilon: float
    exclude_seen: bool
    unlogged: bool
    def __init__(self, user_id: _Optional[str] = ..., session_id: _Optional[str] = ..., slate_size: _Optional[int] = ..., history: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., exclude_item_ids: _Optional[_Iterable[str]] = ..., timestamp_ms: _Optional[int] = ..., epsilon: _Optional[float] = ..., exclude_seen: _Optional[bool] = ..., unlogged: _Optional[bool] = ...) -> None: ...

class Slot(_message.Message):
    __slots__ = ("item_id", "propensity", "q", "explored")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    PROPENSITY_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    EXPLORED_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    propensity: float
    q: float
    explored: bool
    def __init__(self, item_id: _Optional[str] = ..., propensity: _Optional[float] = ..., q: _Optional[float] = ..., explored: _Optional[bool] = ...) -> None: ...

class RecommendResponse(_message.Message):
    __slots__ = ("recommendation_id", "slate", "policy_version", "strategy", "epsilon", "bucket", "exploration")
    RECOMMENDATION_ID_FIELD_NUMBER: _ClassVar[int]
    SLATE_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    EXPLORATION_FIELD_NUMBER: _ClassVar[int]
    recommendation_id: str
    slate: _containers.RepeatedCompositeFieldContainer[Slot]
    policy_version: int
    strategy: Strategy
    epsilon: float
    bucket: str
    exploration: str
    def __init__(self, recommendation_id: _Optional[str] = ..., slate: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., policy_version: _Optional[int] = ..., strategy: _Optional[_Union[Strategy, str]] = ..., epsilon: _Optional[float] = ..., bucket: _Optional[str] = ..., exploration: _Optional[str] = ...) -> None: ...

class BatchRecommendRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RecommendRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RecommendRequest, _Mapping]]] = ...) -> None: ...

class BatchRecommendResponse(_message.Message):
    __slots__ = ("responses",)
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedCompositeFieldContainer[RecommendResponse]
    def __init__(self, responses: _Optional[_Iterable[_Union[RecommendResponse, _Mapping]]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PartitionPosition(_message.Message):
    __slots__ = ("partition", "next_offset")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    partition: int
    next_offset: int
    def __init__(self, partition: _Optional[int] = ..., next_offset: _Optional[int] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy_version", "step", "last_target_sync_step", "network", "epsilon", "age_s", "published_ms", "positions", "items", "strategy", "label", "exploration", "events_through_ms")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_TARGET_SYNC_STEP_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_MS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    EXPLORATION_FIELD_NUMBER: _ClassVar[int]
    EVENTS_THROUGH_MS_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    step: int
    last_target_sync_step: int
    network: str
    epsilon: float
    age_s: float
    published_ms: int
    positions: _containers.RepeatedCompositeFieldContainer[PartitionPosition]
    items: int
    strategy: Strategy
    label: str
    exploration: str
    events_through_ms: int
    def __init__(self, policy_version: _Optional[int] = ..., step: _Optional[int] = ..., last_target_sync_step: _Optional[int] = ..., network: _Optional[str] = ..., epsilon: _Optional[float] = ..., age_s: _Optional[float] = ..., published_ms: _Optional[int] = ..., positions: _Optional[_Iterable[_Union[PartitionPosition, _Mapping]]] = ..., items: _Optional[int] = ..., strategy: _Optional[_Union[Strategy, str]] = ..., label: _Optional[str] = ..., exploration: _Optional[str] = ..., events_through_ms: _Optional[int] = ...) -> None: ...
