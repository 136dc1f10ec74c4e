{{/* What Ray's processes listen on; everything else takes the pod's ephemeral ports. */}}
{{- define "breakeven.rayStartParams" -}}
{{- $group := index . 0 -}}
node-manager-port: "20000"
object-manager-port: "20001"
dashboard-agent-grpc-port: "20002"
runtime-env-agent-port: "20003"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "20100"
max-worker-port: "20999"
{{- if eq $group "head" }}
dashboard-host: "0.0.0.0"
# It keeps the books and runs nothing else.
num-cpus: "0"
{{- else }}
# Roles place what runs here; cores are the container's.
num-cpus: {{ include "breakeven.cores" . | quote }}
resources: {{ include "breakeven.places" $group | squote }}
{{- end }}
{{- end }}

{{/* What a pod offers to Ray, whatever it has. */}}
{{- define "breakeven.cores" -}}64{{- end }}

{{/* Ray takes JSON, and KubeRay passes it through a shell, in quotes of its own. */}}
{{- define "breakeven.places" -}}
{{- $offered := dict (printf "breakeven_%s" .) 1 -}}
{{- if eq . "ingress" }}{{ $_ := set $offered "breakeven_catalogue" 1 }}{{ end -}}
{{ $offered | toJson | quote }}
{{- end }}

{{- define "breakeven.pod" -}}
{{- $group := index . 0 -}}{{- $root := index . 1 -}}
{{- $values := index $root.Values.groups $group -}}
metadata:
  labels:
    {{- include "breakeven.selector" $root | nindent 4 }}
    breakeven/group: {{ $group }}
  {{- with $values.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "breakeven.serviceAccount" $root }}
  # Nothing here speaks to Kubernetes.
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    seccompProfile: {type: RuntimeDefault}
    # UCX, NIXL and our own sockets take free ports: from here, which the NetworkPolicy opens.
    sysctls:
      - {name: net.ipv4.ip_local_port_range, value: "21000 32767"}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "breakeven.selector" $root | nindent 10 }}
          breakeven/group: {{ $group }}
  containers:
    - name: {{ $group | eq "head" | ternary "ray-head" "ray-worker" }}
      image: {{ include "breakeven.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- include "breakeven.container" . | nindent 6 }}
  volumes:
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $values.shm }}}}
    - {name: scratch, emptyDir: {sizeLimit: {{ $values.scratch }}}}
    {{- if or $root.Values.cache.claim $root.Values.cache.create }}
    - {name: cache, persistentVolumeClaim: {claimName: {{ include "breakeven.claim" $root }}}}
    {{- else }}
    - {name: cache, emptyDir: {sizeLimit: {{ $root.Values.cache.size }}}}
    {{- end }}
    - {name: keys, secret: {secretName: {{ $root.Values.secrets.keys }}, defaultMode: 0440}}
    {{- with $root.Values.secrets.tls }}
    - {name: tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
    {{- end }}
{{- end }}

{{- define "breakeven.container" -}}
{{- $group := index . 0 -}}{{- $root := index . 1 -}}
{{- $values := index $root.Values.groups $group -}}
{{- $rdma := and $root.Values.rdma.enabled (has $group (list "prefill" "decode" "vault")) -}}
{{- $resources := deepCopy $values.resources -}}
{{- if $rdma -}}
{{- $devices := dict $root.Values.rdma.resource ($root.Values.rdma.count | toString) -}}
{{- $resources = mergeOverwrite $resources (dict "requests" $devices "limits" $devices) -}}
{{- end -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    {{- if $rdma }}
    # To register memory with the device.
    add: [IPC_LOCK]
    {{- end }}
resources: {{- toYaml $resources | nindent 2 }}
env: {{- include "breakeven.env" . | nindent 2 }}
ports: {{- include "breakeven.ports" . | nindent 2 }}
{{- include "breakeven.probes" . }}
{{- if ne $group "head" }}
lifecycle:
  # Serve moves what runs here before Ray's processes are told to end.
  preStop: {exec: {command: [breakeven, drain, --seconds, {{ sub ($root.Values.terminationGracePeriodSeconds | int) 15 | quote }}]}}
{{- end }}
volumeMounts:
  - {name: shm, mountPath: /dev/shm}
  - {name: scratch, mountPath: /tmp, subPath: tmp}
  - {name: scratch, mountPath: /var/lib/breakeven, subPath: lib}
  - {name: cache, mountPath: /var/cache/breakeven}
  - {name: keys, mountPath: /etc/breakeven/keys, readOnly: true}
  {{- if $root.Values.secrets.tls }}
  - {name: tls, mountPath: /etc/breakeven/tls, readOnly: true}
  {{- end }}
{{- end }}

{{- define "breakeven.env" -}}
{{- $group := index . 0 -}}{{- $root := index . 1 -}}
- {name: HOME, value: /tmp}
- {name: BREAKEVEN_CACHE, value: /var/cache/breakeven}
- {name: HF_HOME, value: /var/cache/breakeven/hub}
- name: BREAKEVEN_CLUSTER_KEY
  valueFrom: {secretKeyRef: {name: {{ include "breakeven.clusterKey" $root }}, key: key}}
# Where NIXL answers other engines.
- name: VLLM_NIXL_SIDE_CHANNEL_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- with $root.Values.secrets.huggingFace }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
{{- end }}
# As `breakeven serve` sets them where it starts Ray.
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
- {name: RAY_prestart_worker_first_driver, value: "0"}
- {name: RAY_enable_worker_prestart, value: "0"}
- {name: RAY_SERVE_LOG_TO_STDERR, value: "0"}
{{- with (index $root.Values.groups $group).env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "breakeven.ports" -}}
{{- $group := index . 0 -}}{{- $root := index . 1 -}}
- {name: metrics, containerPort: 8080}
- {name: agent, containerPort: 52365}
{{- if eq $group "head" }}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: client, containerPort: 10001}
# Nothing answers there; KubeRay wants it for its Service of Serve where a head lists ports.
- {name: serve, containerPort: 8000}
# Of the dashboard and of the autoscaler, for Prometheus.
- {name: dash-metrics, containerPort: 44227}
- {name: as-metrics, containerPort: 44217}
{{- else if eq $group "ingress" }}
- {name: http, containerPort: 8000}
{{- /* Of fewer catalogues nobody knows which pods have one: the others' ports would be targets that are
down for ever. */}}
{{- if eq (include "breakeven.catalogues" $root | int) (include "breakeven.pods" . | int) }}
# The catalogue's.
- {name: breakeven, containerPort: 9465}
{{- end }}
{{- else }}
- {name: breakeven, containerPort: 9464}
{{- end }}
{{- end }}

{{/* A pod lives while its Ray node does; it is ready once what it is for answers. */}}
{{- define "breakeven.probes" -}}
{{- $group := index . 0 -}}{{- $root := index . 1 -}}
{{- $ray := dict "httpGet" (dict "path" "/api/local_raylet_healthz" "port" "agent") -}}
{{- $ready := $ray -}}
{{- if eq $group "ingress" -}}
{{- $ready = dict "httpGet" (dict "path" "/readyz" "port" "http" "scheme" ($root.Values.secrets.tls | empty | ternary "HTTP" "HTTPS")) -}}
{{- else if ne $group "head" -}}
{{- $ready = dict "httpGet" (dict "path" "/metrics" "port" "breakeven") -}}
{{- end }}
livenessProbe:
  {{- toYaml $ray | nindent 2 }}
  initialDelaySeconds: 60
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- toYaml $ready | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}
