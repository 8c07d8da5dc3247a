-- A wide table, times in minutes from admission: prepare_data.py table own_tables --sql vitals.sql --out prepared
WITH long AS (
    UNPIVOT vitals ON temperature, sao2 AS SpO2, heartrate AS HR, respiration AS Resp, systemicsystolic AS SBP
    INTO NAME code VALUE value
)
SELECT patienthealthsystemstayid AS visit_id, uniquepid AS client, code AS observation_type_code,
       TIMESTAMP '2000-01-01' + to_minutes(observationoffset::BIGINT) AS observation_date, value AS observation_value
FROM long JOIN stays USING (patientunitstayid)
